// What /v1/models lists, asked for every few seconds, for all who want to know.

import { get } from "./api.js";
import { keyIsAskedFor, withKey } from "./key.js";

const REFRESH_MS = 5000;
const COLOURS = 6;

let listed = null;
const listeners = new Set();

// Calls `listener` with the list, aliases included, now if it is known and whenever it has been asked for anew. The
// function that comes back ends that.
export function onModels(listener) {
  listeners.add(listener);
  if (listed) listener(listed);
  return () => listeners.delete(listener);
}

// The models that are variants and not aliases.
export function variantsOf(models) {
  return models.filter((model) => !model.lowkey.alias);
}

// A variant's class, which sets its colour: by its place in the list, so that it is the same in all tabs.
export function colourOf(variant, otherwise = 0) {
  const at = variantsOf(listed ?? []).findIndex((model) => model.id === variant);
  return `v${(at < 0 ? otherwise : at) % COLOURS}`;
}

// Asks the server. `ask`: for a key, too, if it wants one. Raises ApiError.
export async function refreshModels(ask = false) {
  const models = async () => (await get("v1/models")).data;
  listed = await (ask ? withKey(models) : models());
  for (const listener of listeners) listener(listed);
}

// Goes on asking while the page can be seen and nothing is `busy`; `failed` is told of errors.
export function keepRefreshing(busy, failed) {
  setInterval(() => {
    if (!busy() && !document.hidden && !keyIsAskedFor()) refreshModels().catch(failed);
  }, REFRESH_MS);
}
