// Numbers for people.

export function bytes(value) {
  if (value == null) return "–";
  const units = ["B", "kB", "MB", "GB"];
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${unit && value < 100 ? value.toPrecision(3) : Math.round(value)} ${units[unit]}`;
}

// What one request held, by its `lowkey` block.
export function state(lowkey) {
  return `${bytes(lowkey.state_bytes)} ${stateKind(lowkey)}`;
}

// The dtype of a request's state, and how much of what it held were keys and values.
export function stateKind(lowkey) {
  return lowkey.state_dtype + (lowkey.kv_bytes ? `, KV ${bytes(lowkey.kv_bytes)}` : "");
}

// What requests hold of a variant, and for how many there is memory, by the model's `lowkey` block.
export function capacity(lowkey) {
  const tokens = lowkey.kv_bytes_per_token ? ` + ${bytes(lowkey.kv_bytes_per_token)} a token` : "";
  const pages = lowkey.pages ? `, ${count(lowkey.pages)} pages` : "";
  return `${bytes(lowkey.state_bytes)} ${lowkey.state_dtype}${tokens} · ${count(lowkey.slots)} slots${pages}`;
}

function count(value) {
  return value.toLocaleString("en");
}

export function seconds(value) {
  if (value == null) return "–";
  return value < 1 ? `${value < 0.01 ? (value * 1000).toFixed(1) : Math.round(value * 1000)} ms` : `${value.toFixed(2)} s`;
}

export function speed(value) {
  if (value == null) return "–";
  return value < 100 ? value.toFixed(1) : String(Math.round(value));
}

export function small(value) {
  if (value == null) return "–";
  if (value !== 0 && Math.abs(value) < 0.001) return value.toPrecision(2);
  return value < 10 ? value.toFixed(3) : value.toFixed(1);
}

export function percent(value) {
  return value == null ? "–" : `${(100 * value).toFixed(value === 1 ? 0 : 1)} %`;
}

export function ratio(value) {
  return value == null ? "–" : `${value.toFixed(2)}×`;
}

// The time of day.
export function clock(date, withSeconds = true) {
  return date.toLocaleTimeString("en-GB", { timeStyle: withSeconds ? "medium" : "short" });
}

export function width(dK) {
  return Array.isArray(dK) ? `${Math.min(...dK)}–${Math.max(...dK)}` : String(dK);
}

// A number at an axis: as short as it can be.
export function tick(value) {
  return value >= 10000 ? `${value / 1000}k` : String(Number(value.toPrecision(3)));
}
