// LaTeX formulas to MathML, which browsers draw themselves. Called by inline.js for what stands between \( \), \[ \] and $ $.
// The part of LaTeX that chat models write: fractions, roots, powers, sums, Greek, matrices, text. A command that is not
// known is shown by its name, and a formula that does not parse is shown as it was written: nothing disappears.

const NS = "http://www.w3.org/1998/Math/MathML";
const MAX_DEPTH = 40;
const MAX_LENGTH = 4000;
const TOKEN = /\\([a-zA-Z]+)\*?|\\([^a-zA-Z])|([{}^_&])|(\d+(?:[.,]\d+)*)|(\s+)|(.)/gsu;

const named = (text) => Object.fromEntries(text.trim().split(/\s+/).map((pair) => pair.split("=")));
const LETTERS = named(`alpha=α beta=β gamma=γ delta=δ epsilon=ϵ varepsilon=ε zeta=ζ eta=η theta=θ iota=ι kappa=κ
  lambda=λ mu=μ nu=ν xi=ξ pi=π rho=ρ sigma=σ tau=τ phi=ϕ varphi=φ chi=χ psi=ψ omega=ω Gamma=Γ Delta=Δ Theta=Θ Lambda=Λ
  Xi=Ξ Pi=Π Sigma=Σ Phi=Φ Psi=Ψ Omega=Ω infty=∞ hbar=ℏ ell=ℓ emptyset=∅ varnothing=∅ partial=∂ nabla=∇ angle=∠ degree=°`);
const SIGNS = named(`times=× cdot=⋅ div=÷ pm=± mp=∓ ast=∗ circ=∘ leq=≤ le=≤ geq=≥ ge=≥ neq=≠ ne=≠ approx=≈ equiv=≡ sim=∼
  cong=≅ propto=∝ ll=≪ gg=≫ in=∈ notin=∉ subset=⊂ subseteq=⊆ supset=⊃ cup=∪ cap=∩ setminus=∖ to=→ rightarrow=→
  leftarrow=← Rightarrow=⇒ Leftarrow=⇐ Leftrightarrow=⇔ leftrightarrow=↔ implies=⟹ iff=⟺ mapsto=↦ forall=∀ exists=∃ neg=¬
  land=∧ lor=∨ wedge=∧ vee=∨ oplus=⊕ otimes=⊗ mid=| parallel=∥ perp=⊥ therefore=∴ because=∵ ldots=… dots=… cdots=⋯ vdots=⋮
  ddots=⋱ lfloor=⌊ rfloor=⌋ lceil=⌈ rceil=⌉ langle=⟨ rangle=⟩ prime=′ quad=\u2003 qquad=\u2003\u2003 colon=: lvert=| rvert=|`);
const LARGE = named("sum=∑ prod=∏ int=∫ iint=∬ oint=∮ bigcup=⋃ bigcap=⋂");
const FUNCTIONS = new Set("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp det dim ker gcd deg arg".split(" "));
const LIMITED = new Set("lim max min sup inf".split(" "));
const ACCENTS = named("hat=^ bar=‾ overline=‾ tilde=~ vec=→ dot=˙ ddot=¨ widehat=^");
const VARIANTS = { mathbf: "bold", boldsymbol: "bold", mathcal: "script", mathrm: "normal", operatorname: "normal" };
const SETS = named("C=ℂ H=ℍ N=ℕ P=ℙ Q=ℚ R=ℝ Z=ℤ");
const TEXTS = new Set(["text", "textbf", "textrm", "textit", "mbox"]);
const SILENT = new Set(["displaystyle", "textstyle", "limits", "nolimits", "big", "Big", "bigg", "Bigg", "bigl", "bigr", "Bigl", "Bigr"]);
const FENCES = { pmatrix: "()", bmatrix: "[]", vmatrix: "||", cases: "{", matrix: "", aligned: "", align: "", gathered: "", array: "" };

/** A <math> element for `source`, or null where it cannot be read as LaTeX. */
export function mathNode(source, display) {
  if (source.length > MAX_LENGTH) return null;
  const tokens = [...source.matchAll(TOKEN)];
  try {
    const parser = new Parser(tokens);
    const body = parser.row(() => false, 0);
    const math = element("math", body);
    if (display) math.setAttribute("display", "block");
    math.setAttribute("alttext", source);
    return math;
  } catch (error) {
    if (error instanceof NotMath) return null;
    throw error;
  }
}

class NotMath extends Error {}

function element(name, children, attributes = {}) {
  const node = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...(Array.isArray(children) ? children : [children]));
  return node;
}

const operator = (text, attributes) => element("mo", text, attributes);
const grouped = (nodes) => (nodes.length === 1 ? nodes[0] : element("mrow", nodes));

class Parser {
  #tokens;
  #at = 0;

  constructor(tokens) {
    this.#tokens = tokens;
  }

  #peek() {
    while (this.#tokens[this.#at]?.[5] !== undefined) this.#at += 1;
    return this.#tokens[this.#at];
  }

  #next() {
    const token = this.#peek();
    if (!token) throw new NotMath();
    this.#at += 1;
    return token;
  }

  /** Nodes up to the token for which `ends` holds (not taken), or to the end of the source. */
  row(ends, depth) {
    if (depth > MAX_DEPTH) throw new NotMath();
    const nodes = [];
    for (let token = this.#peek(); token && !ends(token); token = this.#peek()) {
      if (token[0] === "}" || token[0] === "&" || token[0] === "\\\\" || token[1] === "right" || token[1] === "end") throw new NotMath();
      nodes.push(...this.#scripted(depth));
    }
    return nodes;
  }

  #scripted(depth) {
    let base = "^_".includes(this.#peek()[0]) ? element("mrow", []) : this.#atom(depth);
    if (base === null) return [];
    const scripts = {};
    for (let token = this.#peek(); token && (token[0] === "^" || token[0] === "_" || token[0] === "'"); token = this.#peek()) {
      const mark = this.#next()[0];
      const key = mark === "_" ? "low" : "high";
      const script = mark === "'" ? operator("′") : this.#argument(depth);
      scripts[key] = scripts[key] ? element("mrow", [scripts[key], script]) : script;
    }
    const { low, high } = scripts;
    const [both, under, over] = base.limited ? ["munderover", "munder", "mover"] : ["msubsup", "msub", "msup"];
    if (low && high) base = element(both, [base, low, high]);
    else if (low) base = element(under, [base, low]);
    else if (high) base = element(over, [base, high]);
    return [base];
  }

  /** One braced group, or the next atom. */
  #argument(depth) {
    if (depth > MAX_DEPTH) throw new NotMath();
    return this.#peek()?.[0] === "{" ? this.#group(depth) : (this.#atom(depth + 1) ?? element("mrow", []));
  }

  #group(depth) {
    this.#expect("{");
    const nodes = this.row((token) => token[0] === "}", depth + 1);
    this.#expect("}");
    return grouped(nodes);
  }

  #expect(text) {
    if (this.#next()[0] !== text) throw new NotMath();
  }

  #atom(depth) {
    const token = this.#peek();
    if (!token) throw new NotMath();
    if (token[0] === "{") return this.#group(depth);
    this.#next();
    const [whole, command, escaped, , digits] = token;
    if (command) return this.#command(command, depth);
    if (escaped) return /[,;:! ]/.test(escaped) ? element("mspace", [], { width: "0.2em" }) : operator(escaped === "|" ? "∥" : escaped);
    if (digits) return element("mn", digits);
    if (/[{}^_&]/.test(whole)) throw new NotMath();
    if (/\p{L}/u.test(whole)) return element("mi", whole);
    // Brackets grow only between \left and \right.
    return /[()[\]|/]/.test(whole) ? operator(whole, { stretchy: "false" }) : operator(whole === "-" ? "−" : whole);
  }

  #command(name, depth) {
    if (LETTERS[name]) return element("mi", LETTERS[name]);
    if (SIGNS[name]) return operator(SIGNS[name]);
    if (LARGE[name] || LIMITED.has(name)) {
      const node = LARGE[name] ? operator(LARGE[name]) : operator(name, { form: "prefix" });
      node.limited = !name.endsWith("int");
      return node;
    }
    if (FUNCTIONS.has(name)) return element("mi", name);
    if (ACCENTS[name]) return element("mover", [this.#argument(depth), operator(ACCENTS[name])], { accent: "true" });
    if (TEXTS.has(name)) return element("mtext", this.#rawGroup().replaceAll(" ", "\u00a0"));
    if (name === "mathbb") return element("mi", [...this.#rawGroup()].map((letter) => SETS[letter] ?? letter).join(""));
    if (VARIANTS[name]) return element("mrow", this.#argument(depth), { class: `math-${VARIANTS[name]}` });
    if (SILENT.has(name)) return null;
    switch (name) {
      case "frac":
      case "dfrac":
      case "tfrac":
        return element("mfrac", [this.#argument(depth), this.#argument(depth)]);
      case "binom":
        return element("mrow", [operator("("), element("mfrac", [this.#argument(depth), this.#argument(depth)], { linethickness: "0" }), operator(")")]);
      case "sqrt":
        return this.#root(depth);
      case "boxed":
        return element("mrow", this.#argument(depth), { class: "math-boxed" });
      case "left":
        return this.#fenced(depth);
      case "begin":
        return this.#environment(depth);
      default:
        return element("mtext", `\\${name}`);
    }
  }

  #root(depth) {
    if (this.#peek()?.[0] !== "[") return element("msqrt", this.#argument(depth));
    this.#next();
    const index = grouped(this.row((token) => token[0] === "]", depth + 1));
    this.#expect("]");
    return element("mroot", [this.#argument(depth), index]);
  }

  #fenced(depth) {
    const open = this.#fence();
    const body = this.row((token) => token[1] === "right", depth + 1);
    this.#next();
    return element("mrow", [open, ...body, this.#fence()]);
  }

  #fence() {
    const [whole, command, escaped] = this.#next();
    const text = command ? (SIGNS[command] ?? "") : (escaped ?? whole);
    return operator(text === "." ? "" : text, { fence: "true", stretchy: "true" });
  }

  #environment(depth) {
    const name = this.#rawGroup();
    const fences = FENCES[name.replace("*", "")];
    if (fences === undefined) throw new NotMath();
    if (name === "array") this.#rawGroup();
    const rows = [[]];
    while (true) {
      const cell = this.row((token) => token[0] === "&" || token[0] === "\\\\" || token[1] === "end", depth + 1);
      rows[rows.length - 1].push(element("mtd", cell));
      const token = this.#next();
      if (token[1] === "end") break;
      if (token[0] === "\\\\") rows.push([]);
    }
    this.#rawGroup();
    const look = name.startsWith("align") ? { class: "math-aligned", displaystyle: "true" } : {};
    const table = element("mtable", rows.map((cells) => element("mtr", cells)), look);
    const sides = [...fences].map((text) => operator(text, { fence: "true", stretchy: "true" }));
    return element("mrow", [...sides.slice(0, 1), table, ...sides.slice(1)]);
  }

  /** The text of a braced group, spaces kept. */
  #rawGroup() {
    this.#expect("{");
    let text = "";
    while (this.#at < this.#tokens.length && this.#tokens[this.#at][0] !== "}") {
      text += this.#tokens[this.#at][2] ?? this.#tokens[this.#at][0];
      this.#at += 1;
    }
    this.#expect("}");
    return text;
  }
}
