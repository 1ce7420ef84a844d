// Text to be copied, with the button that does it.

import { el } from "./dom.js";

const SHOWN_MS = 2000;

export function snippet(text, what) {
  const code = el("code", {}, text);
  const button = el("button", { type: "button", class: "quiet", "aria-label": `Copy ${what}` }, "Copy");
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      // Browsers give pages the clipboard over HTTPS and on this machine only.
      getSelection().selectAllChildren(code);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, SHOWN_MS);
  });
  return el("div", { class: "snippet" }, el("pre", { tabindex: "0" }, code), button);
}
