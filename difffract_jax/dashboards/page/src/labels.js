// Names beside nodes and groups, where they cover nothing.
import { short } from "./dom.js";
import { FONT, GUTTER, STEPS, radius, screen } from "./frame.js";
import { thumbnailBox } from "./maps.js";

const CELL = 8;

/** Draws names beside nodes, the most influential first, where they cover nothing. */
export function paintLabels(ctx, look, frame, nodes, veiled = false) {
  const columns = Math.ceil(frame.width / CELL);
  const rows = Math.ceil(frame.height / CELL);
  const taken = new Uint8Array(columns * rows);
  const claim = (x0, y0, x1, y1, only) => {
    const [a, b] = [Math.max(0, Math.floor(x0 / CELL)), Math.min(columns - 1, Math.floor(x1 / CELL))];
    const [c, d] = [Math.max(0, Math.floor(y0 / CELL)), Math.min(rows - 1, Math.floor(y1 / CELL))];
    if (only) for (let j = c; j <= d; j++) for (let i = a; i <= b; i++) if (taken[j * columns + i]) return false;
    for (let j = c; j <= d; j++) for (let i = a; i <= b; i++) taken[j * columns + i] = 1;
    return true;
  };
  const several = look.layout.rows.some((row) => row.several);
  const dots = veiled ? nodes : look.shownNodes;
  for (const node of dots) {
    const [x, y] = screen(frame, look, node);
    const r = radius(look, node);
    if (x > 0 && y > 0 && x < frame.width && y < frame.height) claim(x - r + 1, y - r + 1, x + r - 1, y + r - 1, false);
    const box = veiled ? null : thumbnailBox(look, frame, node);
    if (box) claim(box[0], box[1], box[0] + box[2], box[1] + box[3], false);
  }
  if (!veiled) paintGroupNames(ctx, look, frame, claim);
  ctx.textBaseline = "middle";
  for (const node of nodes) {
    const [x, y] = screen(frame, look, node);
    if (x < GUTTER.left - 10 || y < 4 || x > frame.width || y > frame.height - GUTTER.bottom) continue;
    const target = look.graph.isTarget[node];
    ctx.font = `${target ? "600 12.5px" : "500 11.5px"} ${FONT}`;
    const text = short(look.title(node), target ? 48 : 26);
    const width = ctx.measureText(text).width;
    const r = radius(look, node) + (target ? 7 : 5);
    const spots = [
      [x + r, y - 7, "left"],
      [x - r - width, y - 7, "left"],
      [x - width / 2, y - r - 14, "left"],
      [x - width / 2, y + r, "left"],
    ];
    for (const [wanted, top] of spots) {
      let left = wanted;
      const last = target && left === spots[3][0] && top === spots[3][1];
      const [from, to] = [GUTTER.left - 10, frame.width - (several ? STEPS : 2)];
      if (last) left = Math.max(from, Math.min(to - width, left));
      if (!last && (left < from || left + width > to)) continue;
      if (!claim(left, top, left + width, top + 13, !last)) continue;
      ctx.textAlign = "left";
      ctx.lineJoin = "round";
      ctx.lineWidth = 3.5;
      ctx.strokeStyle = look.colours.paper;
      ctx.strokeText(text, left, top + 7);
      ctx.fillStyle = look.colours.ink;
      ctx.fillText(text, left, top + 7);
      break;
    }
  }
}

/** Draws the names that groups were given by hand, above the topmost member of each; found groups have none of their own. */
function paintGroupNames(ctx, look, frame, claim) {
  for (const group of look.groups) {
    const members = group.nodes.filter((node) => look.nodeShown[node]);
    if (!members.length || / and \d+ more$/.test(group.name)) continue;
    const top = members.reduce((a, b) => (look.layout.y[a] <= look.layout.y[b] ? a : b));
    const [x, y] = screen(frame, look, top);
    ctx.font = `italic 600 11.5px ${FONT}`;
    ctx.textAlign = "center";
    ctx.textBaseline = "middle";
    const text = short(group.name, 28);
    const half = ctx.measureText(text).width / 2;
    const line = y - radius(look, top) - 15;
    if (line < 8 || !claim(x - half, line - 7, x + half, line + 6, true)) continue;
    ctx.lineJoin = "round";
    ctx.lineWidth = 3.5;
    ctx.strokeStyle = look.colours.paper;
    ctx.strokeText(text, x, line);
    ctx.fillStyle = look.colours.ink;
    ctx.fillText(text, x, line);
  }
}
