// Where things are on the screen: room for the axes, places and sizes of nodes, the font.
import { FEATURE } from "./data.js";

export const GUTTER = { left: 86, bottom: 46, top: 14, right: 18 };
/** Room at the right for the steps' names and images, where steps are unfolded. */
export const STEPS = 78;
export const FONT = '"Inter", system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif';

/** Returns the radius of a node in pixels, by its influence over the largest. */
export function radius(look, node) {
  const { graph, influence, most } = look;
  if (graph.isTarget[node]) return 8.5;
  const base = graph.node_kind[node] === FEATURE ? 3.6 : 3;
  return (base + 5.2 * Math.sqrt(Math.max(0, influence[node]) / most)) * look.scale;
}

/** Returns where a node is on the screen. */
export const screen = (frame, look, node) => [
  look.layout.x[node] * frame.k + frame.x,
  look.layout.y[node] * frame.k + frame.y,
];
