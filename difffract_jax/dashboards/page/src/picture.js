// The generated image beside the graph, the prompt's words, and where a node is active on both.
import { TXT, mapOf } from "./data.js";
import { fill, h, short } from "./dom.js";
import { wordsOf } from "./layout.js";

export class Picture {
  /** Takes a graph, its images, a sentence in place of them, and what to call when something is pointed at. */
  constructor(graph, images, note, on) {
    this.graph = graph;
    this.on = on;
    this.grid = graph.grid;
    this.words = wordsOf(graph);
    this.canvas = h("canvas", { class: "heat", "aria-hidden": "true" });
    this.photo = h("img", { alt: "The image of the graph's run", draggable: "false" });
    this.caption = h("figcaption", {});
    this.frame = h("div", { class: "photo", tabindex: "0", role: "img", "aria-label": "Image: move over it to see its nodes" }, this.photo, this.canvas);
    this.steps = h("div", { class: "steps", role: "group", "aria-label": "Predicted clean image of each step" });
    this.line = h("p", { class: "words", lang: "en" });
    this.element = h("figure", { class: "picture" }, this.frame, this.steps, this.line, this.caption);
    this.images = images;
    this.note = note;
    this.element.classList.toggle("without", !this.images.length);
    if (!this.images.length) this.photo.remove();
    if (this.images.length > 1) fill(this.steps, this.images.map((image, place) => this.stepButton(image, place)));
    this.choose(0);
    this.frame.addEventListener("pointermove", (event) => this.hover(event));
    this.frame.addEventListener("pointerleave", () => this.on.patch(null));
    this.fillWords();
    this.heat(null, graph);
    const wide = this.grid ? this.grid[1] / this.grid[0] : 1;
    this.frame.style.setProperty("--wide", String(wide));
    if (!this.grid && !this.images.length) this.frame.remove();
  }

  stepButton(image, place) {
    const name = image.step === null ? "image" : `step ${image.step}`;
    return h("button", { type: "button", title: image.step === null ? "The finished image" : `The clean image that step ${image.step} predicts`,
      onclick: () => this.choose(place, true) },
      h("img", { src: image.address, alt: "" }), h("span", {}, name));
  }

  /** Shows one of the images: the finished one first, then what each step predicts. */
  choose(place, tell = false) {
    this.chosen = place;
    if (this.images.length) this.photo.src = this.images[place].address;
    [...this.steps.children].forEach((button, i) => button.setAttribute("aria-pressed", String(i === place)));
    if (tell) this.on.image(place);
  }

  fillWords() {
    fill(this.line, this.words.map((word, place) => h("span", {
      class: word === "padding" ? "word padding" : "word", "data-word": place,
      onpointerenter: () => this.on.word(place), onpointerleave: () => this.on.word(null),
    }, h("bdi", {}, short(word, 24)))));
    this.line.hidden = !this.words.length;
  }

  hover(event) {
    if (!this.grid) return;
    const box = this.frame.getBoundingClientRect();
    const [rows, columns] = this.grid;
    const column = Math.min(columns - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * columns)));
    const row = Math.min(rows - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * rows)));
    this.on.patch(row * columns + column);
  }

  /** Shows where a node is active: heat over the image, or on the words; null for none. */
  heat(node, graph, colours, mark = null) {
    const { grid, canvas } = this;
    const words = [...this.line.children];
    words.forEach((word) => word.style.removeProperty("background-color"));
    this.element.classList.toggle("heated", node !== null);
    if (grid) {
      [canvas.height, canvas.width] = grid;
    }
    const ctx = canvas.getContext("2d");
    ctx.clearRect(0, 0, canvas.width, canvas.height);
    if (mark !== null && grid) {
      ctx.fillStyle = `rgba(${(colours?.heat ?? [217, 95, 14]).join(",")},0.75)`;
      ctx.fillRect(mark % grid[1], Math.floor(mark / grid[1]), 1, 1);
    }
    if (node === null) return this.say();
    const [positions, values] = mapOf(graph, node);
    let most = 0;
    for (const value of values) most = Math.max(most, Math.abs(value));
    const text = graph.node_stream[node] === TXT;
    for (let i = 0; i < positions.length && most; i++) {
      const share = Math.abs(values[i]) / most;
      const rgb = values[i] < 0 ? colours.cold : colours.heat;
      if (text) {
        const word = words[Math.min(positions[i], words.length - 1)];
        if (word) word.style.setProperty("background-color", `rgba(${rgb.join(",")},${(0.75 * share).toFixed(3)})`);
      } else if (grid && positions[i] < grid[0] * grid[1]) {
        ctx.fillStyle = `rgba(${rgb.join(",")},${(0.85 * share).toFixed(3)})`;
        ctx.fillRect(positions[i] % grid[1], Math.floor(positions[i] / grid[1]), 1, 1);
      }
    }
    this.say(positions.length ? "" : "The file does not tell where this node is active.");
  }

  /** Says something below the image; what is said of images in general if nothing else is. */
  say(text = "") {
    const general = this.images.length ? this.about() : this.note || "The graph has no image; give one with --image FILE.";
    fill(this.caption, h("bdi", {}, text || general));
  }

  about() {
    const image = this.images[this.chosen ?? 0];
    if (image.step === null) return this.images.length > 1 ? "The finished image." : "Point at the image or a word to see which nodes are active there.";
    return `The clean image that step ${image.step} predicts.`;
  }
}

/** Returns the nodes that are active at a position of a stream, with their share of their largest value. */
export function activeAt(graph, text, position, padding) {
  const active = [];
  for (let n = 0; n < graph.count; n++) {
    if ((graph.node_stream[n] === TXT) !== text) continue;
    const [positions, values] = mapOf(graph, n);
    let strength = graph.node_position[n] === position ? 1 : 0;
    let most = 0;
    for (let i = 0; i < positions.length; i++) {
      most = Math.max(most, Math.abs(values[i]));
      const mine = padding !== null && text ? Math.min(positions[i], padding) === position : positions[i] === position;
      if (mine) strength = Math.max(strength, Math.abs(values[i]));
    }
    if (strength > 0) active.push([n, most ? strength / most : 1]);
  }
  return active.sort((a, b) => b[1] - a[1]);
}
