// Texts in, records out: the counterpart of pipeline_multitask.py for the graphs that `python -m release.onnx` writes.
import { AutoModel, AutoTokenizer, Tensor } from "@huggingface/transformers";

const CASINGS = ["unknown", "lower", "title", "upper", "capital", "mixed", "digits", "punctuation"];
const argmax = (values) => values.reduce((best, value, i) => (value > values[best] ? i : best), 0);
const pairs = (keys, values) => Object.fromEntries(keys.map((key, i) => [key, values[i]]));
const softmax = (logits) => {
  const powers = logits.map((x) => Math.exp(x - logits[argmax(logits)]));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((x) => x / sum);
};

const isMark = (character) => /^\p{M}/u.test(character);
const joinsWords = (character) => /^[\p{L}\p{N}\p{M}_]/u.test(character ?? " ");
const standsAlone = (character) => /^[\s\p{P}$+<=>^`|~\p{Script=Han}]/u.test(character ?? " ");
// What the uncased tokenizer makes of a character; of spaces, accents and control characters, nothing.
const fold = (character) =>
  /[\p{Cc}\p{Cf}\p{Co}\s\uFFFD]/u.test(character) ? "" : character.normalize("NFD").replace(/\p{Mn}/gu, "").toLowerCase();

function casingOf(word) {
  const isLower = (part) => part === part.toLowerCase() && part !== part.toUpperCase();
  const isUpper = (part) => part === part.toUpperCase() && part !== part.toLowerCase();
  const [first, ...rest] = word;
  if (isLower(word)) return "lower";
  if (isUpper(word)) return rest.length ? "upper" : "capital";
  if (isUpper(first) && isLower(rest.join(""))) return "title";
  if (/\p{Lu}/u.test(word)) return "mixed";
  if (/[\p{Nd}²³¹⁰-⁹₀-₉①-⑨]/u.test(word)) return "digits";
  return /\p{L}/u.test(word) ? "lower" : "punctuation";
}

// Returns each word's first and last token and its offsets in `text`, by following the tokens through the characters.
function findWords(text, tokens, unknown) {
  const characters = [...text], starts = [0], words = [];
  for (const character of characters) starts.push(starts.at(-1) + character.length);
  let at = 0;
  tokens.forEach((token, index) => {
    if (index === 0 || index === tokens.length - 1) return; // [CLS] and [SEP]
    while (at < characters.length && !fold(characters[at])) at++;
    const first = at;
    const isUnknown = token === unknown && !text.startsWith(unknown, starts[at]);
    let left = isUnknown ? Infinity : token.replace(/^##(?=.)/, "").length;
    do left -= fold(characters[at++]).length;
    while (at < characters.length && (isUnknown ? ![at - 1, at].some((i) => standsAlone(characters[i])) : left > 0));
    while (at < characters.length && isMark(characters[at]) && !fold(characters[at])) at++;
    const joined = joinsWords(characters[first - 1]) && joinsWords(characters[first]);
    const isNew = !token.startsWith("##") && !isMark(characters[first - 1] ?? "");
    if (!isMark(characters[first]) && (isNew || !joined)) words.push({ first: index, start: starts[first] });
    if (words.length) Object.assign(words.at(-1), { last: index, end: starts[at] });
  });
  return words;
}

// Returns the best label of each word under the rule that I-X follows B-X or I-X (Viterbi); scores: log-probabilities.
function decode(scores, labels) {
  const follows = (from, to) => !labels[to].startsWith("I-") || labels[from].slice(1) === labels[to].slice(1);
  const from = (total, to) => total.map((value, i) => (follows(i, to) ? value : -Infinity));
  let total = labels.map((label) => (label === "O" ? 0 : -Infinity)); // as if a word outside came before
  const back = scores.map((row) => {
    const best = labels.map((_, to) => argmax(from(total, to)));
    total = row.map((score, to) => score + from(total, to)[best[to]]);
    return best;
  });
  const path = [argmax(total)];
  for (const best of back.reverse()) path.unshift(best[path[0]]);
  return path.slice(1);
}

function entities(text, words, logits, { labels }) {
  const scores = words.map((word) => softmax(logits[word.first]));
  const isBio = labels.some((label) => /^[BI]-/.test(label));
  const path = isBio ? decode(scores.map((row) => row.map(Math.log)), labels) : scores.map(argmax);
  const groups = [];
  path.forEach((label, i) => {
    if (labels[label] === "O" && isBio) return;
    if (isBio && labels[label].startsWith("I-")) groups.at(-1).push(i);
    else groups.push([i]);
  });
  return groups.map((group) => {
    const { start } = words[group[0]], { end } = words[group.at(-1)], name = labels[path[group[0]]];
    const score = group.reduce((sum, i) => sum + scores[i][path[i]], 0) / group.length;
    return { entity_group: isBio ? name.slice(2) : name, score, word: text.slice(start, end), start, end };
  });
}

function answer(logits, { labels, problem_type, thresholds, fallback }) {
  if (problem_type === "regression") return { values: pairs(labels, logits) };
  if (problem_type === "multi_label_classification") {
    const scores = logits.map((x) => 1 / (1 + Math.exp(-x)));
    const present = labels.filter((_, i) => scores[i] >= (thresholds?.[i] ?? 0.5));
    return { labels: present.length || !fallback ? present : [fallback], scores: pairs(labels, scores) };
  }
  const scores = softmax(logits), best = argmax(scores);
  return { label: labels[best], score: scores[best], scores: pairs(labels, scores) };
}

export class Annotator {
  // `model` is a folder or a Hub id that holds onnx/; with `quantized`, the 8-bit graphs. `options` go to from_pretrained.
  static async load(model, { quantized = false, ...options } = {}) {
    const file = quantized ? "model_quantized" : "model";
    const graph = (part) => AutoModel.from_pretrained(model, { ...options, dtype: "fp32", model_file_name: `${file}_${part}` });
    const parts = [AutoTokenizer.from_pretrained(model, options), graph("embedding"), graph("tasks")];
    return Object.assign(new Annotator(), pairs(["tokenizer", "embedder", "tagger"], await Promise.all(parts)));
  }

  // Returns a record per text: sentence_embedding (unless `embedding` is false), labels and entities of every task.
  async annotate(texts, { embedding = true } = {}) {
    if (!texts.length) return [];
    const read = texts.map((text) => text.replaceAll("Σ", "σ")); // toLowerCase would make the last one of a word another letter
    const inputs = this.tokenizer(read, { padding: true, truncation: false }), [count, length] = inputs.input_ids.dims;
    const { model_max_length: limit, unk_token: unknown } = this.tokenizer;
    if (length > limit) throw new RangeError(`a text has ${length} tokens; allowed: ${limit}. Divide it first.`);
    const words = read.map((text) => findWords(text, this.tokenizer.tokenize(text, { add_special_tokens: true }), unknown));
    const casings = new BigInt64Array(count * length);
    words.forEach((found, row) => {
      for (const { first, last, start, end } of found) {
        const casing = BigInt(CASINGS.indexOf(casingOf(texts[row].slice(start, end))));
        casings.fill(casing, row * length + first, row * length + last + 1);
      }
    });
    const vectors = embedding ? (await this.embedder(inputs)).sentence_embedding.tolist() : [];
    const found = await this.tagger({ ...inputs, casing_ids: new Tensor("int64", casings, [count, length]) });
    const records = texts.map((_, row) => ({ ...(embedding && { sentence_embedding: vectors[row] }), labels: {}, entities: {} }));
    for (const [name, spec] of Object.entries(this.tagger.config.tasks)) {
      found[`logits.${name}`].tolist().forEach((logits, row) => {
        if (spec.kind === "token_classification") records[row].entities[name] = entities(texts[row], words[row], logits, spec);
        else records[row].labels[name] = answer(logits, spec);
      });
    }
    return records;
  }
}
