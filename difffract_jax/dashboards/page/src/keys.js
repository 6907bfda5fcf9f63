// The keyboard. Keys are left alone while somebody types.
import { pin, addToGroup } from "./edits.js";

/** Listens to the keyboard for an app. */
export function listen(app) {
  const node = (act) => () => {
    const selected = app.selected();
    if (selected !== null) act(selected);
  };
  const into = (selector) => node(() => {
    app.panel.open("node");
    app.panel.card.querySelector(selector)?.focus();
  });
  const keys = {
    "/": () => app.searchBox.focus(),
    "?": () => app.help.showModal(),
    p: node((n) => pin(app, n)),
    g: node((n) => addToGroup(app, n)),
    n: into("input.rename"),
    m: into("textarea.note"),
    t: () => app.togglePath(),
    o: node((n) => app.openPage(n)),
    u: () => app.store.undo(),
    r: () => app.store.redo(),
    s: () => { if (!app.fold.hidden) app.store.look({ unfolded: !app.store.view.unfolded }); },
    f: () => app.fit(),
    d: () => app.setTheme(!app.dark),
    l: () => app.copyLink(),
    ArrowUp: () => app.walk("up"),
    ArrowDown: () => app.walk("down"),
    ArrowLeft: () => app.walk("left"),
    ArrowRight: () => app.walk("right"),
    Escape: () => app.select(null),
  };
  document.addEventListener("keydown", (event) => {
    // A dialog that was closed keeps the focus until the next frame; a key pressed by then is the page's.
    const typing = event.target.closest?.("input:not([type=range]), textarea, select, dialog[open]");
    if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z" && !typing) {
      event.preventDefault();
      return event.shiftKey ? app.store.redo() : app.store.undo();
    }
    if (typing) {
      if (event.key === "Escape" && !event.target.closest("dialog")) event.target.blur();
      return undefined;
    }
    if (event.ctrlKey || event.metaKey || event.altKey) return undefined;
    const act = keys[event.key];
    if (!act || (event.target.matches?.("input[type=range]") && event.key.startsWith("Arrow"))) return undefined;
    event.preventDefault();
    return act();
  });
}
