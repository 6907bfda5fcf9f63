// Colours of the drawing, light and dark. Blue, amber and vermilion are told apart with every common colour blindness;
// kinds of nodes differ in shape too, and lowering edges are named by sign in every table.
const LIGHT = {
  paper: "#ffffff", ink: "#1b2330", muted: "#6b7480", line: "#d9dde3", rule: "#eef0f3", band: "#f7f8fa",
  image: "#1f77b4", text: "#e08e0b", error: "#8b93a0", rest: "#b9c0ca", score: "#009e73",
  positive: "#4a5a70", negative: "#d1450b", pin: "#1b2330", select: "#7b3fb5",
  heat: [217, 95, 14], cold: [31, 119, 180],
  groups: ["#56b4e9", "#f0b429", "#009e73", "#cc79a7", "#8c6bb1", "#7f8c8d", "#d55e00", "#0072b2"],
};
const DARK = {
  paper: "#14171c", ink: "#eef1f5", muted: "#98a2b0", line: "#333a45", rule: "#20252d", band: "#191d24",
  image: "#5fb0f0", text: "#f2b134", error: "#7e8896", rest: "#5b6573", score: "#2fc79b",
  positive: "#a9b7ca", negative: "#ff7a3d", pin: "#eef1f5", select: "#c79bf2",
  heat: [255, 138, 51], cold: [95, 176, 240],
  groups: LIGHT.groups,
};

/** Returns the colours of a theme. */
export const coloursOf = (dark) => (dark ? DARK : LIGHT);

/** Says whether the reader's system asks for dark. */
export const prefersDark = () => window.matchMedia?.("(prefers-color-scheme: dark)").matches ?? false;
