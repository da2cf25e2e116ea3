// A small line chart of the last minutes, with its extremes in words.

import { h, s, uid } from "../core/dom.js";
import { t } from "../core/i18n.js";

const WIDTH = 240;
const HEIGHT = 48;

/** `points`: [{time, value}] in order; null values leave gaps. `say` writes a value. */
export function sparkline(title, points, say) {
  const values = points.map((point) => point.value).filter((value) => value !== null && value !== undefined);
  const most = Math.max(...values, 0);
  const now = values.length ? values[values.length - 1] : null;
  const id = uid("spark");
  const first = points[0]?.time ?? 0;
  const span = Math.max((points[points.length - 1]?.time ?? 1) - first, 1);
  const top = most || 1;
  let line = "";
  let pen = "M";
  let end = "";
  for (const { time, value } of points) {
    if (value === null || value === undefined) {
      pen = "M";
      continue;
    }
    const x = ((time - first) / span) * WIDTH;
    const y = HEIGHT - 3 - (value / top) * (HEIGHT - 8);
    end = `${Math.min(x, WIDTH - 2).toFixed(1)} ${y.toFixed(1)}`;
    line += `${pen}${x.toFixed(1)} ${y.toFixed(1)}`;
    pen = "L";
  }
  const said = now === null ? t("pipeline.noData") : t("pipeline.sparkSaid", { now: say(now), most: say(most) });
  return h(
    "figure.spark",
    null,
    h("figcaption", null, h("span.label", { id }, title), h("span.figure", null, now === null ? "–" : say(now))),
    s(
      "svg",
      { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": `${title}: ${said}` },
      s("path", { d: `M0 ${HEIGHT - 2}H${WIDTH}`, class: "spark-base" }),
      line ? s("path", { d: line, class: "spark-line" }) : null,
      end ? s("path", { d: `M${end}h.01`, class: "spark-dot" }) : null,
    ),
    h("p.soft.small", { "aria-hidden": "true" }, said),
  );
}
