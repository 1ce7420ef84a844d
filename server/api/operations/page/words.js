// Numbers in sentences.

export function whole(value) {
  return value.toLocaleString("en");
}

export function counted(count, what = "request") {
  return `${whole(count)} ${what}${count === 1 ? "" : "s"}`;
}
