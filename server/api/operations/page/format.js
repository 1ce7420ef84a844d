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

// What one request holds of a variant, by its `lowkey` block.
export function state(lowkey) {
  return `${bytes(lowkey.state_bytes)} ${lowkey.state_dtype}`;
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
  if (value !== 0 && Math.abs(value) < 0.001) return value.toExponential(1);
  return value < 10 ? value.toFixed(3) : value.toFixed(1);
}

export function percent(value) {
  return value == null ? "–" : `${(100 * value).toFixed(value === 1 ? 0 : 1)} %`;
}

export function ratio(value) {
  return value == null ? "–" : `${value.toFixed(2)}×`;
}

export function width(dK) {
  return Array.isArray(dK) ? `${Math.min(...dK)}–${Math.max(...dK)}` : String(dK);
}
