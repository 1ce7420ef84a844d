// The page: its tabs, which the address's hash names, what the server runs, and the API key.

import * as ab from "./ab.js";
import * as compare from "./compare.js";
import { $, complain, el } from "./dom.js";
import { askForKey } from "./key.js";
import * as memory from "./memory.js";
import { keepRefreshing, onModels, refreshModels, variantsOf } from "./models.js";
import { fleet } from "./view.js";

// A tab exports `show(root)`, called whenever it is opened, and `hide()`, called when another one is. What it has put
// into its root may stay there.
const TABS = { compare, ab, memory };
let open = null;

function follow() {
  const asked = location.hash.slice(1);
  const name = Object.hasOwn(TABS, asked) ? asked : "compare";
  if (name === open) return;
  TABS[open]?.hide();
  open = name;
  for (const tab of Object.keys(TABS)) {
    $(`tab-${tab}`).hidden = tab !== name;
    const link = $("tabs").querySelector(`[href="#${tab}"]`);
    if (tab === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `Lowkey: ${$("tabs").querySelector("[aria-current]").textContent}`;
  TABS[name].show($(`tab-${name}`));
}

async function refreshAndAsk() {
  complain(null);
  try {
    await refreshModels(true);
  } catch (error) {
    complain(error);
  }
}

onModels((models) => $("fleet").replaceChildren(...fleet(variantsOf(models))));
addEventListener("hashchange", follow);
$("key-button").addEventListener("click", async () => {
  if (await askForKey()) refreshAndAsk();
});
follow();
refreshAndAsk();
keepRefreshing(compare.isRunning, (error) => {
  if (error.status !== 401) $("fleet").replaceChildren(el("li", { class: "down" }, error.message));
});
