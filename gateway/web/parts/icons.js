// Small drawings. Each state has a shape of its own, so that colour alone says nothing.

import { s } from "../core/dom.js";

const SHAPES = {
  serving: () => s("circle", { cx: 8, cy: 8, r: 5, fill: "currentColor" }),
  starting: () => [
    s("circle", { cx: 8, cy: 8, r: 5, fill: "none", stroke: "currentColor", "stroke-width": 2 }),
    s("circle", { cx: 8, cy: 8, r: 1.5, fill: "currentColor" }),
  ],
  unreachable: () =>
    s("path", {
      d: "M3.5 3.5l9 9m0-9l-9 9",
      fill: "none",
      stroke: "currentColor",
      "stroke-width": 2.5,
      "stroke-linecap": "round",
    }),
  warning: () =>
    s("path", { d: "M8 1.5l7 12.5H1zM7.2 6v4h1.6V6zM7.2 11.2v1.6h1.6v-1.6z", fill: "currentColor", "fill-rule": "evenodd" }),
  theme: () => [
    s("circle", { cx: 8, cy: 8, r: 6, fill: "none", stroke: "currentColor", "stroke-width": 1.5 }),
    s("path", { d: "M8 2a6 6 0 0 1 0 12z", fill: "currentColor" }),
  ],
  key: () =>
    s("path", {
      d: "M10.5 9.5a4 4 0 1 0-3.7-2.6L1.5 12v2.5H4V13h1.5v-1.5H7l1-1.3a4 4 0 0 0 2.5-.7zM11.5 4.5h.01",
      fill: "none",
      stroke: "currentColor",
      "stroke-width": 1.5,
      "stroke-linejoin": "round",
      "stroke-linecap": "round",
    }),
  add: () => s("path", { d: "M8 13V3m0 0L4 7m4-4l4 4", fill: "none", stroke: "currentColor", "stroke-width": 1.5, "stroke-linecap": "round", "stroke-linejoin": "round" }),
};

export function icon(name) {
  return s(
    "svg",
    { viewBox: "0 0 16 16", width: 16, height: 16, class: `icon ${name}`, "aria-hidden": "true", focusable: "false" },
    SHAPES[name](),
  );
}
