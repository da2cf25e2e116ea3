// What views share, and what outlives a change of view or language. Nothing of it is kept after
// the page is closed.

import { call } from "./api.js";

export const store = {
  /** /v1/models, or null before it is known. */
  models: null,
  ask: {
    from: "passage",
    mode: "extractive",
    question: "",
    context: "",
    collection: "default",
    candidates: 5,
    fresh: false,
    /** { from, request, body } of the last answer. */
    result: null,
    failure: null,
  },
  chat: { messages: [], picture: null, draft: "", temperature: "", longest: 512 },
  /** { request, body } by the answer's request id, for the view that says why. */
  explained: null,
  documents: { collection: "default", uploads: [] },
  compare: { left: "", right: "", question: "", context: "", others: [], results: null },
};

/** Looks which models are served. Throws Failure. */
export async function lookAtModels(options) {
  const { models } = await call("v1/models", options);
  store.models = models;
  return models;
}

/** The model of a kind that is served, or undefined. */
export const modelOf = (kind) => (store.models || []).find((model) => model.kind === kind);
