// The page's state: `doc`, what a person made of the graph and can undo; `view`, what is looked at.
import { deflateSync, inflateSync, strFromU8, strToU8 } from "fflate";
import { fromBase64 } from "./data.js";

const MOST_UNDONE = 200;

/** Holds the state, tells listeners what changed, and keeps what can be undone. */
export class Store {
  constructor(doc, view) {
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

  /** Takes a state from an address; returns whether it was one. */
  follow(hash) {
    if (!hash) return false;
    try {
      const text = strFromU8(inflateSync(fromBase64(hash.replaceAll("-", "+").replaceAll("_", "/"))));
      const state = JSON.parse(text);
      this.doc = { ...JSON.parse(this.initial.doc), ...(state.doc ?? {}) };
      this.view = { ...this.initial.view, ...(state.view ?? {}) };
    } catch {
      return false;
    }
    this.tell("doc");
    this.tell("view");
    return true;
  }
}
