// Writing: a chat with the decoder, streamed, that can be stopped; pictures and recordings in it.

import { events, request, upload } from "../core/api.js";
import { field, h } from "../core/dom.js";
import { failureBox } from "../core/failures.js";
import { count, ms, number, t } from "../core/i18n.js";
import { modelOf, store } from "../core/store.js";
import { isChinese } from "../core/text.js";
import { attachments } from "./attachments.js";

const PROMPTS = ["explain", "translate", "summarise"];

export function chat({ signal, announce }) {
  const state = store.chat;
  const writer = modelOf("generative");
  let running = null;
  const log = h("div.messages", { role: "log", "aria-label": t("chat.messages"), tabindex: 0 });
  const trouble = h("div");
  const text = h("textarea", {
    id: "message",
    rows: 3,
    value: state.draft,
    oninput: () => {
      state.draft = text.value;
    },
    onkeydown: (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      send();
    },
  });
  const submit = h("button.main", { type: "submit" }, t("chat.send"));
  const stop = h("button", { type: "button", hidden: true, onclick: () => running?.abort() }, t("chat.stop"));
  const temperature = h("input", {
    type: "number",
    min: 0,
    max: 2,
    step: 0.1,
    placeholder: t("chat.usual"),
    value: state.temperature,
    oninput: () => {
      state.temperature = temperature.value;
    },
  });
  const longest = h("input", {
    type: "number",
    min: 1,
    max: 8192,
    value: state.longest,
    oninput: () => {
      state.longest = Number(longest.value) || 512;
    },
  });

  function bubble(message) {
    const words = h(
      "p.bubble-text",
      { dir: "auto", lang: isChinese(message.content) ? "zh" : null },
      message.content,
    );
    const box = h(
      `div.bubble.${message.role}`,
      null,
      h("p.label", null, t(`chat.${message.role}`)),
      message.picture ? h("img.picture", { src: message.picture.url, alt: message.picture.name }) : null,
      words,
      message.note ? h("p.soft.small", null, message.note) : null,
    );
    return { box, words };
  }

  function draw() {
    if (!state.messages.length) {
      log.replaceChildren(
        h("p.soft", null, writer ? t("chat.empty", { model: writer.name }) : t("chat.emptyMedia")),
        h(
          "p.examples",
          null,
          (writer ? PROMPTS : []).map((name) =>
            h(
              "button.link",
              {
                type: "button",
                onclick: () => {
                  text.value = state.draft = t(`chat.prompt.${name}`);
                  text.focus();
                },
              },
              t(`chat.try.${name}`),
            ),
          ),
        ),
      );
    } else log.replaceChildren(...state.messages.map((message) => bubble(message).box));
    log.scrollTop = log.scrollHeight;
    anew.hidden = !state.messages.length;
  }

  const attached = h("p.row", { hidden: true });

  function attach(picture) {
    state.picture = picture;
    attached.hidden = !picture;
    attached.replaceChildren(
      ...(picture
        ? [
            h("img.picture.thumb", { src: picture.url, alt: "" }),
            h("span", null, t("chat.attached", { name: picture.name })),
            h("button.small", { type: "button", onclick: () => attach(null) }, t("chat.detach")),
          ]
        : []),
    );
    if (picture) announce(t("chat.attached", { name: picture.name }));
  }

  function tell(words) {
    trouble.replaceChildren(h("div.notice.bad", { role: "alert" }, h("p", null, words)));
  }

  async function hear(file) {
    if (running) return;
    const asked = { role: "user", content: t("chat.recording", { name: file.name }) };
    state.messages.push(asked);
    trouble.replaceChildren();
    draw();
    const answer = { role: "assistant", content: "", note: "" };
    const { box, words } = bubble(answer);
    words.textContent = t("chat.hearing");
    log.append(box);
    log.setAttribute("aria-busy", "true");
    running = new AbortController();
    submit.disabled = true;
    const begun = performance.now();
    try {
      const form = new FormData();
      form.append("file", file, file.name);
      const heard = await upload("v1/audio/transcriptions", form, { progress: () => {} });
      answer.content = heard.text || t("chat.silence");
      answer.note = ms(performance.now() - begun);
      state.messages.push(answer);
      announce(answer.content);
    } catch (error) {
      state.messages = state.messages.filter((message) => message !== asked);
      trouble.replaceChildren(failureBox(error));
    }
    running = null;
    submit.disabled = false;
    log.removeAttribute("aria-busy");
    if (!signal.aborted) draw();
  }

  /** What the model gets to read: of pictures, the last message's. */
  function spoken({ role, content, picture }, index) {
    if (!picture || index < state.messages.length - 1) return { role, content: content || picture?.name || "" };
    const part = { type: "image_url", image_url: { url: picture.url } };
    return { role, content: content ? [{ type: "text", text: content }, part] : [part] };
  }

  async function send() {
    const content = state.draft.trim();
    const { picture } = state;
    if ((!content && !picture) || running) return;
    if (!picture && !writer) {
      tell(t("chat.needsFile"));
      return;
    }
    state.messages.push({ role: "user", content, picture });
    text.value = state.draft = "";
    attach(null);
    trouble.replaceChildren();
    draw();
    const answer = { role: "assistant", content: "", note: "" };
    const { box, words } = bubble(answer);
    log.append(box);
    // Read out once whole: a word at a time would be noise.
    log.setAttribute("aria-busy", "true");
    running = new AbortController();
    signal.addEventListener("abort", () => running?.abort());
    submit.disabled = true;
    stop.hidden = false;
    const begun = performance.now();
    let first = 0;
    let tokens = 0;
    let reason = "";
    try {
      const body = {
        messages: state.messages.map(spoken),
        stream: true,
        stream_options: { include_usage: true },
      };
      // A description is as long as its model's makers advise.
      if (!picture) body.max_tokens = state.longest;
      if (state.temperature !== "") body.temperature = Number(state.temperature);
      const response = await request("v1/chat/completions", { method: "POST", body, signal: running.signal });
      for await (const event of events(response)) {
        if (event.usage) tokens = event.usage.completion_tokens;
        const choice = event.choices[0];
        if (!choice) continue;
        if (choice.delta?.content) {
          first ||= performance.now();
          answer.content += choice.delta.content;
          words.textContent = answer.content;
          if (log.scrollHeight - log.scrollTop - log.clientHeight < 120) log.scrollTop = log.scrollHeight;
        }
        reason = choice.finish_reason || reason;
      }
    } catch (error) {
      if (error.name === "AbortError") reason = "stopped";
      else trouble.replaceChildren(failureBox(error));
    }
    const seconds = (performance.now() - (first || begun)) / 1000;
    running = null;
    submit.disabled = false;
    stop.hidden = true;
    log.removeAttribute("aria-busy");
    if (answer.content || reason === "stopped") {
      const parts = [];
      if (first) parts.push(t("chat.first", { time: ms(first - begun) }));
      if (tokens > 1 && seconds > 0) {
        parts.push(count("chat.tokens", tokens), t("chat.rate", { n: number((tokens - 1) / seconds) }));
      }
      if (reason === "length") parts.push(t("chat.cut"));
      if (reason === "stopped") parts.push(t("chat.stopped"));
      answer.note = parts.join(" · ");
      state.messages.push(answer);
      announce(reason === "stopped" ? t("chat.stopped") : answer.content);
    } else {
      // Nothing came: the question goes back to where it can be sent again.
      state.messages.pop();
      text.value = state.draft = content;
      attach(picture);
    }
    if (!signal.aborted) draw();
  }

  const files = attachments({
    onPicture: attach,
    onSound: hear,
    onOther: (name) => tell(t("chat.otherFile", { name })),
  });
  attach(state.picture);

  const anew = h(
    "button",
    {
      type: "button",
      onclick: () => {
        running?.abort();
        state.messages = [];
        attach(null);
        trouble.replaceChildren();
        draw();
        text.focus();
      },
    },
    t("chat.anew"),
  );
  draw();
  return h(
    "div.chat",
    null,
    log,
    trouble,
    h(
      "form.card.form",
      {
        novalidate: true,
        onsubmit: (event) => {
          event.preventDefault();
          send();
        },
      },
      files,
      attached,
      field(t("chat.message"), text, t("chat.shortcut")),
      h("div.row", null, submit, stop, anew),
      h(
        "details",
        null,
        h("summary", null, t("chat.options")),
        h("div.grid2", null, field(t("chat.temperature"), temperature), field(t("chat.longest"), longest)),
      ),
    ),
  );
}
