// Markdown to DOM nodes, made for text that is still growing: `render` keeps the nodes of blocks that did not change.
// Called by view.js. Block structure is here, inline text in inline.js. A subset, lenient where models are:
// headings, paragraphs (a newline is a break), fenced code, lists, quotes, tables, rules, display math as text.

import { h, iconButton } from "./dom.js";
import { inlineNodes } from "./inline.js";

const MAX_DEPTH = 8;
const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const RULE = /^ {0,3}(?:(?:\* *){3,}|(?:- *){3,}|(?:_ *){3,})$/;
const QUOTE = /^ {0,3}> ?/;
// An item has text: an answer that is just "42." is no empty list.
const ITEM = /^( *)([-*+]|\d{1,9}[.)]) +(\S.*)$/;
// Other numbers than 1 begin a list only after a blank line: "in\n1986. It" is no list.
const ITEM_IN_TEXT = /^ *(?:[-*+]|1[.)]) +\S/;
const TABLE_RULE = /^ {0,3}\|?(?: *:?-+:? *\|)+(?: *:?-+:? *)?$/;

/** Shows `text` in `container`, touching only what changed since the last call. */
export function render(container, text, labels) {
  if (container.renderedText === text) return;
  container.renderedText = text;
  const blocks = parseBlocks(text.replace(/\r\n?/g, "\n").split("\n"));
  const kept = container.renderedSources ?? [];
  const sources = blocks.map((block) => block.source);
  let same = 0;
  while (same < sources.length && sources[same] === kept[same]) same += 1;
  while (container.childNodes.length > same) container.lastChild.remove();
  container.append(...blocks.slice(same).map((block) => build(block, labels, 0)));
  container.renderedSources = sources;
}

/** Splits lines into blocks {type, source, ...}. Pure. */
export function parseBlocks(lines) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const { end, ...block } = blockAt(lines, at);
    block.source = `${block.type}\n${lines.slice(at, end).join("\n")}`;
    blocks.push(block);
    at = end;
  }
  return blocks;
}

function blockAt(lines, at) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return fencedAt(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) return { type: "heading", level: heading[1].length, text: heading[2].trim().replace(/ #+$/, ""), end: at + 1 };
  if (RULE.test(line)) return { type: "rule", end: at + 1 };
  if (QUOTE.test(line)) {
    const end = runEnd(lines, at, (each) => QUOTE.test(each));
    return { type: "quote", lines: lines.slice(at, end).map((each) => each.replace(QUOTE, "")), end };
  }
  if (ITEM.test(line)) return listAt(lines, at);
  if (tableStarts(lines, at)) {
    const end = runEnd(lines, at + 2, (each) => each.includes("|"));
    return { type: "table", align: cells(lines[at + 1]).map(alignment), rows: [lines[at], ...lines.slice(at + 2, end)].map(cells), end };
  }
  const end = runEnd(lines, at + 1, (each, index) => each.trim() && !interrupts(lines, index));
  return { type: "paragraph", text: lines.slice(at, end).map((each) => each.trim()).join("\n"), end };
}

function runEnd(lines, from, goesOn) {
  let end = from;
  while (end < lines.length && goesOn(lines[end], end)) end += 1;
  return end;
}

const interrupts = (lines, at) =>
  [FENCE, HEADING, RULE, QUOTE, ITEM_IN_TEXT].some((start) => start.test(lines[at])) || tableStarts(lines, at);

const tableStarts = (lines, at) => lines[at].includes("|") && TABLE_RULE.test(lines[at + 1] ?? "");

function fencedAt(lines, at, [opening, marks, info]) {
  const indent = opening.length - opening.trimStart().length;
  const close = runEnd(lines, at + 1, (line) => {
    const bare = line.trim();
    return !(bare.length >= marks.length && bare === marks[0].repeat(bare.length));
  });
  const body = lines.slice(at + 1, close).map((line) => line.slice(Math.min(indent, line.length - line.trimStart().length)));
  return { type: "code", language: info.trim().split(/\s/, 1)[0], text: body.join("\n"), end: Math.min(close + 1, lines.length) };
}

function listAt(lines, at) {
  const [, , marker] = ITEM.exec(lines[at]);
  const ordered = /\d/.test(marker);
  const outer = indentOf(lines[at]);
  const items = [];
  let loose = false;
  let end = at;
  while (end < lines.length) {
    const match = ITEM.exec(lines[end]);
    if (match && match[1].length < outer + 2 && /\d/.test(match[2]) === ordered && !RULE.test(lines[end])) {
      items.push({ body: [match[3]], inner: match[1].length + match[2].length + 1 });
      end += 1;
      continue;
    }
    const item = items[items.length - 1];
    const blank = !lines[end].trim();
    if (blank) {
      // A blank line belongs to the list only if the list goes on behind it.
      const next = runEnd(lines, end, (line) => !line.trim());
      const following = lines[next] === undefined ? null : ITEM.exec(lines[next]);
      const sibling = following && following[1].length < outer + 2 && /\d/.test(following[2]) === ordered;
      if (lines[next] === undefined || !(indentOf(lines[next]) >= outer + 2 || sibling)) break;
      loose = true;
    } else if (indentOf(lines[end]) < outer + 2 && (ITEM.test(lines[end]) || interrupts(lines, end) || !lines[end - 1].trim())) {
      break;
    }
    item.body.push(lines[end].slice(Math.min(item.inner, indentOf(lines[end]))));
    end += 1;
  }
  return { type: "list", ordered, start: ordered ? Number.parseInt(marker, 10) : 1, items: items.map(({ body }) => body), loose, end };
}

const indentOf = (line) => line.length - line.trimStart().length;

function cells(line) {
  // NUL keeps the place of an escaped bar while the line is split.
  const trimmed = line.replace(/\\\|/g, "\0").trim().replace(/^\|/, "").replace(/\|$/, "");
  return trimmed.split("|").map((cell) => cell.trim().replaceAll("\0", "|"));
}

const alignment = (rule) =>
  rule.startsWith(":") && rule.endsWith(":") ? "center" : rule.endsWith(":") ? "right" : null;

function build(block, labels, depth) {
  switch (block.type) {
    case "heading":
      // The page itself uses h1 and h2.
      return h(`h${Math.min(block.level + 2, 6)}`, {}, ...inlineNodes(block.text));
    case "rule":
      return h("hr");
    case "code":
      return codeBlock(block, labels);
    case "quote":
      return h("blockquote", {}, ...nested(block.lines, labels, depth));
    case "list":
      return h(block.ordered ? "ol" : "ul", { start: block.start === 1 ? null : block.start }, ...block.items.map((item) => listItem(item, block, labels, depth)));
    case "table":
      return table(block);
    default:
      return h("p", {}, ...inlineNodes(block.text));
  }
}

function nested(lines, labels, depth) {
  if (depth >= MAX_DEPTH) return [h("p", {}, lines.join("\n"))];
  return parseBlocks(lines).map((block) => build(block, labels, depth + 1));
}

function listItem(lines, { loose }, labels, depth) {
  const task = /^\[([ xX])\] /.exec(lines[0]);
  const body = task ? [lines[0].slice(4), ...lines.slice(1)] : lines;
  const children = nested(body, labels, depth);
  // A tight item's first paragraph stands without paragraph spacing.
  if (!loose && children[0]?.tagName === "P") children.splice(0, 1, ...children[0].childNodes);
  const box = task && h("input", { type: "checkbox", disabled: true, checked: task[1] !== " ", "aria-label": lines[0].slice(4) });
  return h("li", { class: task ? "task" : null }, box, ...children);
}

function codeBlock({ language, text }, labels) {
  const copy = iconButton("copy", labels.copyCode, null, { "data-action": "copy-code" });
  const head = h("div", { class: "code-head" }, h("span", {}, language || labels.code), copy);
  const body = h("pre", { tabindex: "0", "aria-label": language || labels.code }, h("code", {}, text));
  return h("div", { class: "code-block" }, head, body);
}

function table({ rows, align }) {
  // As many columns as the longest row: nothing a model wrote is dropped.
  const columns = Array.from({ length: Math.max(...rows.map((texts) => texts.length)) }, (_, column) => align[column] ?? null);
  const row = (texts, tag) =>
    h("tr", {}, ...columns.map((side, column) => h(tag, { class: side && `align-${side}`, scope: tag === "th" ? "col" : null }, ...inlineNodes(texts[column] ?? ""))));
  const [head, ...body] = rows;
  return h("div", { class: "table-frame", tabindex: "0" }, h("table", {}, h("thead", {}, row(head, "th")), h("tbody", {}, ...body.map((texts) => row(texts, "td")))));
}
