// The page's state: `doc`, what a person made of the graph and can undo; `view`, what is looked at.
import { deflateSync, inflateSync, strFromU8, strToU8 } from "fflate";
import { fromBase64 } from "./data.js";

const MOST_UNDONE = 200;

const isText = (value) => typeof value === "string";
const isFlag = (value) => typeof value === "boolean";
const isShare = (value) => typeof value === "number" && value > 0 && value <= 1;
const isRecord = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const areTexts = (value) => Array.isArray(value) && value.every(isText);
const namesTexts = (value) => isRecord(value) && Object.values(value).every(isText);

/** What each part of the state must be like; an address or a file may hold anything. */
export const SHAPES = {
  mode: (value) => ["standard", "difffract"].includes(value),
  node_threshold: isShare,
  edge_threshold: isShare,
  groups: (value) => Array.isArray(value) && value.every((group) => isRecord(group) && isText(group.name) && areTexts(group.members)),
  names: namesTexts,
  notes: namesTexts,
  pinned: areTexts,
  selected: (value) => value === null || isText(value),
  unfolded: isFlag,
  path: isFlag,
  camera: (value) => value === null || (isRecord(value) && value.k > 0 && ["k", "x", "y"].every((key) => Number.isFinite(value[key]))),
  image: (value) => Number.isInteger(value) && value >= 0,
};

/** Holds the state, tells listeners what changed, and keeps what can be undone. */
export class Store {
  /** Takes the state to open with, and the keys of what can be shown: one graph, the other, both, or their difference. */
  constructor(doc, view, shows) {
    this.shapes = { ...SHAPES, show: (value) => shows.includes(value) };
    this.initial = { doc: JSON.stringify(doc), view };
    this.doc = doc;
    this.view = { ...view };
    this.past = [];
    this.future = [];
    this.listeners = [];
  }

  listen(listener) {
    this.listeners.push(listener);
  }

  tell(what) {
    for (const listener of this.listeners) listener(what);
  }

  /** Changes what can be undone: `change` gets a copy of `doc` to write to. */
  edit(change) {
    const before = JSON.stringify(this.doc);
    const next = JSON.parse(before);
    change(next);
    if (JSON.stringify(next) === before) return;
    this.past.push(before);
    if (this.past.length > MOST_UNDONE) this.past.shift();
    this.future = [];
    this.doc = next;
    this.tell("doc");
  }

  /** Changes `doc` without a step to undo, while a slider is dragged; `edit` follows when it is let go. */
  preview(change) {
    this.held ??= JSON.stringify(this.doc);
    const next = JSON.parse(JSON.stringify(this.doc));
    change(next);
    this.doc = next;
    this.tell("doc");
  }

  /** Makes one step to undo of everything previewed since the last. */
  settle() {
    if (this.held === undefined) return;
    const before = this.held;
    this.held = undefined;
    if (JSON.stringify(this.doc) === before) return;
    this.past.push(before);
    this.future = [];
    this.tell("doc");
  }

  undo() {
    if (this.past.length) this.step(this.past, this.future);
  }

  redo() {
    if (this.future.length) this.step(this.future, this.past);
  }

  step(from, to) {
    to.push(JSON.stringify(this.doc));
    this.doc = JSON.parse(from.pop());
    this.tell("doc");
  }

  /** Changes what is looked at. */
  look(change) {
    Object.assign(this.view, change);
    this.tell("view");
  }

  /** Returns the state as the part of an address behind #; "" for the state that the page opened with. */
  link() {
    const view = {};
    for (const [key, value] of Object.entries(this.view)) {
      if (JSON.stringify(value) !== JSON.stringify(this.initial.view[key])) view[key] = value;
    }
    const state = { ...(JSON.stringify(this.doc) === this.initial.doc ? {} : { doc: this.doc }), view };
    if (!state.doc && !Object.keys(view).length) return "";
    const bytes = deflateSync(strToU8(JSON.stringify(state)), { level: 9 });
    let raw = "";
    for (const byte of bytes) raw += String.fromCharCode(byte);
    return btoa(raw).replaceAll("+", "-").replaceAll("/", "_").replace(/=+$/, "");
  }

  /** Returns one half of a state, with what of a given one has the right shape in place of what the page opened with. */
  over(initial, given) {
    const fits = ([key, value]) => Object.keys(initial).includes(key) && this.shapes[key](value);
    return { ...initial, ...Object.fromEntries(Object.entries(given ?? {}).filter(fits)) };
  }

  /** Takes a state from an address; returns whether it was one. */
  follow(hash) {
    if (!hash) return false;
    try {
      const text = strFromU8(inflateSync(fromBase64(hash.replaceAll("-", "+").replaceAll("_", "/"))));
      const state = JSON.parse(text);
      this.doc = this.over(JSON.parse(this.initial.doc), state.doc);
      this.view = this.over(this.initial.view, state.view);
    } catch {
      return false;
    }
    this.tell("doc");
    this.tell("view");
    return true;
  }
}
