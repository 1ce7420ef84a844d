"use strict";
// A browser starts no worker for a page that it has read from a disk. There a hidden frame stands in for the one that searches.
if (location.protocol === "file:") {
  window.Worker = class {
    #frame = document.createElement("iframe");
    #loaded;

    constructor(url) {
      this.#frame.hidden = true;
      document.body.append(this.#frame);
      const { contentWindow: inside, contentDocument: page } = this.#frame;
      inside.postMessage = (message) => this.#deliver(this, message);
      const script = page.createElement("script");
      script.src = url;
      this.#loaded = new Promise((resolve) => script.addEventListener("load", resolve));
      script.addEventListener("error", (event) => this.onerror?.(event));
      page.head.append(script);
    }

    // Later and as a copy, as between a page and a worker.
    #deliver(receiver, message) {
      const data = structuredClone(message);
      setTimeout(() => receiver.onmessage?.({ data }));
    }

    postMessage(message) {
      this.#loaded.then(() => this.#deliver(this.#frame.contentWindow ?? {}, message));
    }

    terminate() {
      this.#frame.remove();
    }
  };
}
