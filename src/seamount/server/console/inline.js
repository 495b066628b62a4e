// Inline markdown (bold, italic, code, links, ...) to DOM nodes. Called by markdown.js.
// Safe by construction: every piece of model text becomes a text node, and only http(s) addresses become links.
// Images are shown as links and never loaded: an answer must not be able to make the page fetch anything.

import { h } from "./dom.js";
import { mathNode } from "./math.js";

const MAX_DEPTH = 6;
const MAX_ADDRESS = 2000;
// Each alternative begins with a different character, and none can backtrack over more than its own span.
const TOKEN = /\\([\\`*_{}\])#+\-.!|~<>$])|(`+)|(!?\[)|(https?:\/\/[^\s<>"'`\u2e80-\u9fff\uff00-\uffef]+)|<(https?:\/\/[^\s<>]+)>|(\*\*|__|~~|\*|_)|(\\\(|\\\[|\$\$?)|(<br ?\/?>)|(\n)/g;
const TAG = { "**": "strong", __: "strong", "*": "em", _: "em", "~~": "s" };
const MATH_END = { "\\(": "\\)", "\\[": "\\]", $$: "$$", $: "$" };

/** The nodes for one run of inline text. */
export function inlineNodes(text, depth = 0) {
  const nodes = [];
  // Delimiters known to have no partner further on, so that many lone ones stay linear.
  const unpaired = new Set();
  let plain = "";
  let at = 0;
  const push = (node) => {
    if (plain) nodes.push(document.createTextNode(plain));
    plain = "";
    nodes.push(node);
  };
  // A copy, since nested calls move lastIndex.
  const token = new RegExp(TOKEN);
  while (true) {
    token.lastIndex = at;
    const match = token.exec(text);
    if (!match) break;
    plain += text.slice(at, match.index);
    const found = depth < MAX_DEPTH ? span(text, match, depth, unpaired) : null;
    if (found?.node) push(found.node);
    else plain += found?.text ?? match[0];
    at = found?.end ?? match.index + match[0].length;
  }
  plain += text.slice(at);
  if (plain) nodes.push(document.createTextNode(plain));
  return nodes;
}

/** What starts at `match`: {node | text, end}, or null where it is only text. */
function span(text, match, depth, unpaired) {
  const start = match.index;
  const after = start + match[0].length;
  const [whole, escaped, ticks, bracket, bare, angled, mark, math, lineBreak, newline] = match;
  if (math) return formula(text, math, after, unpaired);
  if (escaped) return { text: escaped, end: after };
  if (ticks) return codeSpan(text, ticks, after, unpaired);
  if (bracket) return link(text, start, after, depth, unpaired);
  if (bare) return bareLink(bare, start);
  if (angled) return { node: anchor(angled, [angled]), end: after };
  if (mark) return emphasis(text, mark, start, after, depth, unpaired);
  if (lineBreak || newline) return { node: h("br"), end: after };
  return { text: whole, end: after };
}

function formula(text, open, from, unpaired) {
  const close = MATH_END[open];
  if (unpaired.has(close)) return null;
  const end = text.indexOf(close, from);
  if (end < 0) unpaired.add(close);
  if (end < 0) return null;
  const body = text.slice(from, end);
  // Prices are no formulas: a single $ touches what it encloses, stays on its line, and no digit follows it.
  if (open === "$" && (/^\s|\s$|\n|^$/.test(body) || /\d/.test(text[end + 1] ?? ""))) return null;
  const display = open === "\\[" || open === "$$";
  return { node: mathNode(body, display) ?? h("span", { class: "math" }, body.trim()), end: end + close.length };
}

function codeSpan(text, ticks, from, unpaired) {
  if (unpaired.has(ticks)) return null;
  let end = from;
  while ((end = text.indexOf(ticks, end)) >= 0) {
    let run = end;
    while (text[run] === "`") run += 1;
    if (run - end === ticks.length) {
      return { node: h("code", {}, text.slice(from, end).replace(/\n/g, " ").replace(/^ (.+) $/, "$1")), end: run };
    }
    end = run;
  }
  unpaired.add(ticks);
  return null;
}

function emphasis(text, mark, start, from, depth, unpaired) {
  const underscore = mark[0] === "_";
  // snake_case and 2 * 3 are not emphasis: an opener touches its text, an underscore also stands at a word's edge.
  if (/\s|^$/.test(text[from] ?? "") || (underscore && /[\p{L}\p{N}]/u.test(text[start - 1] ?? ""))) return null;
  if (unpaired.has(mark)) return null;
  let end = from;
  while ((end = text.indexOf(mark, end + 1)) >= 0) {
    if (/[\s\\]/.test(text[end - 1])) continue;
    if (mark.length === 1 && (text[end + 1] === mark || text[end - 1] === mark)) {
      end += 1;
      continue;
    }
    if (underscore && /[\p{L}\p{N}]/u.test(text[end + mark.length] ?? "")) continue;
    // ***both***: the inner pair closes first.
    if (mark.length === 2 && text[end + 2] === mark[0]) end += 1;
    return { node: h(TAG[mark], {}, ...inlineNodes(text.slice(from, end), depth + 1)), end: end + mark.length };
  }
  unpaired.add(mark);
  return null;
}

function link(text, start, from, depth, unpaired) {
  if (unpaired.has("](")) return null;
  const middle = text.indexOf("](", from);
  if (middle < 0) unpaired.add("](");
  const inner = text.indexOf("[", from);
  if (middle < 0 || (inner >= 0 && inner < middle)) return null;
  let level = 1;
  let end = middle + 2;
  const limit = Math.min(text.length, end + MAX_ADDRESS);
  for (; end < limit && level > 0; end += 1) {
    if (text[end] === "\n") return null;
    level += text[end] === "(" ? 1 : text[end] === ")" ? -1 : 0;
  }
  if (level > 0) return null;
  const address = text.slice(middle + 2, end - 1).trim().split(/\s/, 1)[0].replace(/^<(.*)>$/, "$1");
  const label = text.slice(from, middle);
  // Any other scheme (javascript:, data:, file:) stays as it was written.
  if (!safeAddress(address)) return { text: text.slice(start, end), end };
  return { node: anchor(address, label ? inlineNodes(label, depth + 1) : [address]), end };
}

function bareLink(address, start) {
  let kept = address.replace(/[.,;:!?*_~]+$/, "");
  if (kept.endsWith(")") && !kept.includes("(")) kept = kept.slice(0, -1);
  return safeAddress(kept) ? { node: anchor(kept, [kept]), end: start + kept.length } : null;
}

function safeAddress(address) {
  try {
    return ["http:", "https:"].includes(new URL(address).protocol);
  } catch {
    return false;
  }
}

function anchor(address, children) {
  return h("a", { href: address, title: address, target: "_blank", rel: "noopener noreferrer nofollow" }, ...children);
}
