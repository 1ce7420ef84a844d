// Where answers part, and where a model stops thinking.

// Index of the first character at which two texts differ, or -1 while neither contradicts the other.
function divergence(a, b) {
  const shared = Math.min(a.length, b.length);
  for (let i = 0; i < shared; i += 1) if (a[i] !== b[i]) return i;
  return -1;
}

// Index of the first character at which one of the texts leaves the baseline's, or -1.
export function divergenceOf(base, texts) {
  const points = texts.map((text) => divergence(base, text)).filter((at) => at >= 0);
  return points.length ? Math.min(...points) : -1;
}

// Character offset of a token in its text; a stop string may have cut the text before it.
export function offsetOf(tokens, index, text) {
  return index == null ? -1 : Math.min(tokens.slice(0, index).join("").length, text.length);
}

const [BEGIN, END] = ["<think>", "</think>"];

// Where the answer begins in a text: behind what its model thought. 0 if it didn't, and the text's end while it still
// does. `open`: the prompt ended within its thinking.
export function answerStart(text, open) {
  if (!open && !text.trimStart().startsWith(BEGIN)) return 0;
  const end = text.indexOf(END);
  return end < 0 ? text.length : text.length - text.slice(end + END.length).trimStart().length;
}

// Where what was thought begins and ends in a text whose answer begins at `from`: without its tags and the blanks there.
export function thoughtSpan(text, from) {
  const whole = text.slice(0, from);
  const [before] = whole.match(/^\s*(<think>\s*)?/);
  const thought = whole.slice(before.length);
  return [before.length, before.length + thought.replace(/\s*(<\/think>\s*)?$/, "").length];
}

// Whether a rendered prompt, given as its tokens' texts, ends within thinking.
export function leavesThinkingOpen(tokens) {
  const text = tokens.join("");
  return text.lastIndexOf(BEGIN) > text.lastIndexOf(END);
}
