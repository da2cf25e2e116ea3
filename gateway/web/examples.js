// A question and a passage in each language, to begin with.

export const EXAMPLES = {
  en: [
    "How long is the Grand Canal?",
    "The Grand Canal links Beijing with Hangzhou. Its oldest parts were dug in the 5th century BC, and it was joined into one waterway under the Sui dynasty. With a length of about 1,776 kilometres it is the longest canal in the world.",
  ],
  zh: [
    "京杭大运河全长约多少公里？",
    "京杭大运河北起北京，南至杭州。最早的河段开凿于公元前五世纪，隋朝时连成一体。运河全长约1776公里，是世界上最长的运河。",
  ],
};
