// Elements from plain calls. Text from a graph reaches the page through textContent and attributes alone, never as markup.

/** Returns an element: h("button", { class: "x", onclick: f }, "text", child). */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, what] of Object.entries(value)) element.style.setProperty(key, what);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat(9).filter((child) => child !== null && child !== undefined));
  return element;
}

/** Replaces the children of an element. */
export function fill(element, ...children) {
  element.replaceChildren(...children.flat(9).filter((child) => child !== null && child !== undefined));
  return element;
}

/** Cuts a text that is too long to be shown. */
export function short(text, most = 60) {
  const letters = Array.from(text);
  return letters.length > most ? `${letters.slice(0, most - 1).join("")}…` : text;
}

/** Returns a text that can be shown whole where there is room: a span with the text, cut, and all of it as its title. */
export function cut(text, most = 60, attributes = {}) {
  const shown = short(text, most);
  return h("bdi", { ...attributes, title: shown === text ? undefined : short(text, 2000) }, shown);
}

/** Returns a number as text: four digits, a real minus sign. */
export function number(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (value === 0) return "0";
  const text = size >= 1e5 || size < 1e-4 ? value.toExponential(digits - 1) : Number(value.toPrecision(digits)).toString();
  return text.replaceAll("-", "−");
}

/** Returns a share as a percentage. */
export function percent(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(100 * value);
  const digits = size >= 10 ? 0 : size >= 1 ? 1 : 2;
  return `${(100 * value).toFixed(digits).replace("-", "−")} %`;
}

/** Downloads text or a blob as a file. */
export function download(name, content, type) {
  const blob = content instanceof Blob ? content : new Blob([content], { type });
  const address = URL.createObjectURL(blob);
  const link = h("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 5000);
}
