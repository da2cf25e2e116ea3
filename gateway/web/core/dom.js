// Making elements. No markup is ever parsed from text, so no text can become markup.

const SVG = "http://www.w3.org/2000/svg";

function fill(made, props, children) {
  for (const [name, value] of Object.entries(props || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "vars") {
      for (const [key, text] of Object.entries(value)) made.style.setProperty(`--${key}`, text);
    } else if (name === "value" || name === "checked") made[name] = value;
    else made.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined && child !== false) made.append(child);
  }
  return made;
}

/** `h("p.soft", {id: "x"}, "text", child)`: an element; null and false children are left out. */
export function h(tag, props, ...children) {
  const [name, ...classes] = tag.split(".");
  const made = document.createElement(name);
  if (classes.length) made.className = classes.join(" ");
  return fill(made, props, children);
}

/** The same for SVG. */
export function s(tag, props, ...children) {
  return fill(document.createElementNS(SVG, tag), props, children);
}

/** A table's head: of each column its content, or [class, content]. */
export function heads(...columns) {
  const cells = columns.map((column) => {
    const [kind, content] = Array.isArray(column) ? column : ["", column];
    return h(kind ? `th.${kind}` : "th", { scope: "col" }, content);
  });
  return h("thead", null, h("tr", null, cells));
}

/** Text for screen readers alone. */
export function hidden(text) {
  return h("span.visually-hidden", null, text);
}

let last = 0;

/** An id that no other element has. */
export function uid(stem) {
  last += 1;
  return `${stem}-${last}`;
}

/** A label and its control, one below the other; `hint` is read with the control. */
export function field(label, control, hint) {
  const id = control.id || uid("field");
  control.id = id;
  const parts = [h("label", { for: id }, label), control];
  if (hint) {
    const note = h("p.hint", { id: `${id}-hint` }, hint);
    control.setAttribute("aria-describedby", note.id);
    parts.push(note);
  }
  return h("div.field", null, parts);
}

/** A group of radio buttons that looks like one switch. */
export function choice(legend, options, chosen, onchange, { quiet = false } = {}) {
  const name = uid("choice");
  return h(
    "fieldset.choice",
    null,
    h(quiet ? "legend.visually-hidden" : "legend", null, legend),
    h(
      "div.segments",
      null,
      options.map(([value, label]) =>
        h(
          "label",
          null,
          h("input", {
            type: "radio",
            name,
            value,
            checked: value === chosen,
            onchange: () => onchange(value),
          }),
          h("span", null, label),
        ),
      ),
    ),
  );
}

/** A check box with its label beside it. */
export function check(label, checked, onchange) {
  const box = h("input", { type: "checkbox", checked, onchange: () => onchange(box.checked) });
  return h("label.check", null, box, h("span", null, label));
}
