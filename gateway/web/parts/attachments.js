// A picture or a recording for a chat: dropped or picked.

import { h } from "../core/dom.js";
import { t } from "../core/i18n.js";
import { modelOf } from "../core/store.js";
import { dropZone } from "./dropzone.js";
import { icon } from "./icons.js";

const PICTURES = "image/png,image/jpeg,image/webp,image/gif";
const SOUNDS = "audio/wav,audio/flac,audio/ogg,audio/mpeg,.wav,.flac,.ogg,.opus,.mp3";

/** The place to drop files on, or null where no model takes any. `onPicture({ name, url })` is
 *  given a data URL, `onSound(file)` a file, `onOther(name)` the name of what is neither. */
export function attachments({ onPicture, onSound, onOther }) {
  const [sees, hears] = [modelOf("captioning"), modelOf("transcribing")];
  if (!sees && !hears) return null;
  const what = sees && hears ? "both" : sees ? "picture" : "sound";
  const picker = h("input.visually-hidden", {
    type: "file",
    id: "attachment",
    accept: [sees ? PICTURES : "", hears ? SOUNDS : ""].filter(Boolean).join(","),
    onchange: () => {
      take(picker.files[0]);
      picker.value = "";
    },
  });
  const zone = dropZone(
    "div.drop.slim",
    (dropped) => take(dropped.files[0]),
    icon("add"),
    h("p", null, t(`chat.drop.${what}`)),
    picker,
    h("label.button", { for: "attachment" }, t("chat.pick")),
  );

  function take(file) {
    if (!file) return;
    if (sees && file.type.startsWith("image/")) {
      const reader = new FileReader();
      reader.onload = () => onPicture({ name: file.name, url: reader.result });
      reader.onerror = () => onOther(file.name);
      reader.readAsDataURL(file);
    } else if (hears && (file.type.startsWith("audio/") || /\.(wav|flac|og[ga]|opus|mp3)$/i.test(file.name))) {
      onSound(file);
    } else onOther(file.name);
  }

  return zone;
}
