// Offsets in answers count Unicode code points; JavaScript's strings count UTF-16 units, of which
// a character beyond U+FFFF takes two.

/** UTF-16 positions of ascending code point positions, in one walk over the text. */
export function unitsOf(text, points) {
  const found = [];
  let unit = 0;
  let point = 0;
  for (const wanted of points) {
    while (point < wanted && unit < text.length) {
      unit += text.codePointAt(unit) > 0xffff ? 2 : 1;
      point += 1;
    }
    found.push(unit);
  }
  return found;
}

/** Number of code points. */
export function pointsIn(text) {
  let count = 0;
  for (let unit = 0; unit < text.length; unit += text.codePointAt(unit) > 0xffff ? 2 : 1) count += 1;
  return count;
}

/** Code points `start` to `end` of a text. */
export function slice(text, start, end) {
  const [from, to] = unitsOf(text, [start, end]);
  return text.slice(from, to);
}

/**
 * Cuts a text where ranges begin and end.
 * `ranges`: [{start, end, …}] in code points, may overlap.
 * Returns [{text, ranges}] in order, with the ranges that cover each part.
 */
export function cut(text, ranges) {
  const valid = ranges.filter((range) => range.end > range.start);
  const points = [...new Set([0, ...valid.flatMap((range) => [range.start, range.end])])];
  points.sort((a, b) => a - b);
  const units = unitsOf(text, points);
  const parts = [];
  for (let index = 0; index < points.length; index += 1) {
    const piece = text.slice(units[index], index + 1 < units.length ? units[index + 1] : text.length);
    if (!piece) continue;
    const at = points[index];
    parts.push({
      text: piece,
      ranges: valid.filter((range) => range.start <= at && at < range.end),
    });
  }
  return parts;
}

/** Whether a text is mostly Chinese. */
export function isChinese(text) {
  return /[\u3400-\u9fff\u{20000}-\u{3ffff}]/u.test(text);
}
