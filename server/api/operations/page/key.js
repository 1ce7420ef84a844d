// The dialog that asks for an API key.

import { ApiError, setKey } from "./api.js";
import { $, capital } from "./dom.js";

const KEPT = "It is kept in this page's memory only and is gone when you reload.";
let asking = null;

// Whether a key was given. However many parts of the page ask at once, there is one dialog.
export function askForKey(message = KEPT) {
  asking ??= ask(message).finally(() => {
    asking = null;
  });
  return asking;
}

function ask(message) {
  const dialog = $("key-dialog");
  $("key-message").textContent = message;
  return new Promise((resolve) => {
    dialog.addEventListener(
      "close",
      () => {
        const used = dialog.returnValue === "use";
        if (used) setKey($("key").value);
        $("key").value = "";
        resolve(used);
      },
      { once: true },
    );
    dialog.returnValue = "cancel";
    dialog.showModal();
  });
}

// Not a submit button: it would be the form's first one, and Enter in the field would press it.
$("key-cancel").addEventListener("click", () => $("key-dialog").close("cancel"));

export function keyIsAskedFor() {
  return asking !== null;
}

// Runs `work`; while the server wants a key, asks for one and tries again.
export async function withKey(work) {
  for (;;) {
    try {
      return await work();
    } catch (error) {
      if (!(error instanceof ApiError) || error.status !== 401) throw error;
      if (!(await askForKey(`${capital(error.message)}. ${KEPT}`))) throw error;
    }
  }
}
