// Elements made by hand: no templates, no frameworks.

export const $ = (id) => document.getElementById(id);

// An attribute that is true is written without a value; one that is false, null or undefined is left out.
export function el(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") node.className = value;
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value != null) node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

export function capital(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}

// Shows an error above whatever tab is open; null takes the last one away.
export function complain(error) {
  const box = $("error");
  box.hidden = !error;
  box.textContent = error ? capital(error.message) : "";
  if (error) box.scrollIntoView({ block: "nearest" });
}
