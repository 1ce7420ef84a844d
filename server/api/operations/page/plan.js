// How many requests a memory holds: the server's own arithmetic (`Room` of server/engine/memory.py), in whole bytes.

export const PAGE_TOKENS = 64;
// What a GPU's variants may take of it unless the server is told otherwise (`device_memory`).
export const GPU_SHARE = 0.9;

export function pagesFor(tokens) {
  return Math.ceil(tokens / PAGE_TOKENS);
}

// Bytes of a request of so many tokens. `bytes` is one dtype's entry of /v1/models: state_bytes, kv_bytes_per_page.
export function requestBytes(bytes, tokens) {
  return bytes.state_bytes + (bytes.kv_bytes_per_page ? pagesFor(tokens) * bytes.kv_bytes_per_page : 0);
}

// Slots and pages of the largest pool in `memory` bytes, for requests of `tokens` tokens. A slot and a page of it belong
// to nobody.
export function split(memory, bytes, tokens) {
  const { state_bytes: slot, kv_bytes_per_page: page } = bytes;
  const least = 2 * slot + (page ? 2 : 1) * page;
  if (memory < least) return { slots: 0, pages: 0 };
  const slots = Math.max(Math.floor((memory - slot - page) / requestBytes(bytes, tokens)), 1);
  if (!page) return { slots, pages: 0 };
  return { slots, pages: Math.floor((memory - (slots + 1) * slot - page) / page) };
}

// How many requests of `tokens` tokens fit into `memory` bytes at the same time.
export function requestsThatFit(memory, bytes, tokens) {
  const { slots, pages } = split(memory, bytes, tokens);
  return bytes.kv_bytes_per_page && pages < pagesFor(tokens) ? 0 : slots;
}

// How many requests of `tokens` tokens the slots and pages hold that a variant has now.
export function requestsNow(lowkey, tokens) {
  return lowkey.pages ? Math.min(lowkey.slots, Math.floor(lowkey.pages / pagesFor(tokens))) : lowkey.slots;
}

// What a GPU of `total` bytes leaves to requests.
export function leftOfGpu(total, sizes) {
  return Math.floor(GPU_SHARE * total) - sizes.other_bytes;
}

const UNITS = { B: 1, KB: 1e3, MB: 1e6, GB: 1e9, TB: 1e12, KIB: 2 ** 10, MIB: 2 ** 20, GIB: 2 ** 30, TIB: 2 ** 40 };

// Bytes of a size as people type it ("80 GB", "1.5GiB"), or null.
export function parseBytes(text) {
  const found = /^\s*(\d+(?:[.,]\d+)?)\s*([kmgt]?i?b)\s*$/i.exec(text);
  const unit = found && UNITS[found[2].toUpperCase()];
  const value = unit ? Math.round(Number(found[1].replace(",", ".")) * unit) : 0;
  return value > 0 && value <= 2 ** 50 ? value : null;
}

// The models to plan for, the dense ones first: the variants of /v1/models that have loaded, those of equal sizes
// together, and the dense originals of reduced ones that are not among them. Of each: `names` of its variants by the dtype
// that they are served in, `here` and `gpu`: what is not for requests, and bytes of a request by dtype.
export function planned(models) {
  const found = new Map();
  const add = (of, reduced, dK, { here, gpu, context_length: context }) => {
    const key = JSON.stringify([reduced, gpu.state_dtypes, here.state_dtypes]);
    if (!found.has(key)) found.set(key, { of, reduced, dK, here, gpu, context, names: {} });
    return found.get(key);
  };
  const loaded = models.filter(({ lowkey }) => lowkey.planning);
  for (const { id, lowkey } of loaded) {
    const row = add(id, Boolean(lowkey.planning.dense_d_k ?? lowkey.method), lowkey.d_k, lowkey.planning);
    (row.names[lowkey.state_dtype] ??= []).push(id);
  }
  for (const { id, lowkey: { planning } } of loaded) {
    if (!planning.dense_d_k) continue;
    const original = (sizes) => ({ other_bytes: sizes.other_bytes, state_dtypes: sizes.dense });
    add(id, false, planning.dense_d_k, { ...planning, here: original(planning.here), gpu: original(planning.gpu) });
  }
  return [...found.values()].sort((a, b) => a.reduced - b.reduced);
}
