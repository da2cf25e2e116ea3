// A place that files are dropped on.

import { h } from "../core/dom.js";

/** An element that shows when files are held over it; `onDrop(dataTransfer)` is given what was
 *  dropped. `selector` and `children` as for `h`. */
export function dropZone(selector, onDrop, ...children) {
  // Leaving a child for another one is not leaving the place.
  let depth = 0;
  const zone = h(
    selector,
    {
      ondragenter: (event) => {
        event.preventDefault();
        depth += 1;
        zone.classList.add("over");
      },
      ondragleave: () => {
        depth -= 1;
        if (!depth) zone.classList.remove("over");
      },
      ondragover: (event) => event.preventDefault(),
      ondrop: (event) => {
        event.preventDefault();
        depth = 0;
        zone.classList.remove("over");
        onDrop(event.dataTransfer);
      },
    },
    ...children,
  );
  return zone;
}
