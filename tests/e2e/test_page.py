"""The page itself: language, colours, phone width, keyboard, parameters, and that model text stays text."""

from __future__ import annotations

import json

import pytest

expect = pytest.importorskip("playwright.sync_api").expect
pytestmark = pytest.mark.browser

MARKDOWN = """## Depths

A *seamount* is **steep**, see `chart(1)` and [the atlas](https://example.org/a?b=1).

1. first
   - inner
2. second

| place | metres |
|:--|--:|
| Emperor | 4,200 |

> quoted

```python
def depth(x):
    return x * 2 < 10
```
"""
HOSTILE = """<img src=x onerror="window.hit = 1"> <script>window.hit = 1</script>

[a](javascript:window.hit=1) [b](data:text/html,<script>window.hit=1</script>) ![c](https://tracker.example/c.png)

<https://ok.example/> [d](https://ok.example/" onclick="window.hit=1)

```<img src=x onerror=window.hit=1>
</code><img src=x onerror=window.hit=1>
```

| <b>x</b> |
|---|
| <img src=x onerror=window.hit=1> |
"""


def send(page, text):
    page.locator("#composer-input").fill(text)
    page.keyboard.press("Enter")


def test_markdown_becomes_structure(page, stage):
    stage.say(MARKDOWN)
    send(page, "Tell me")
    expect(page.locator(".stats")).to_be_visible()
    content = page.locator(".content")
    expect(content.locator("h4")).to_have_text("Depths")
    expect(content.locator("em")).to_have_text("seamount")
    expect(content.locator("strong")).to_have_text("steep")
    expect(content.locator("p code")).to_have_text("chart(1)")
    expect(content.locator("a")).to_have_attribute("href", "https://example.org/a?b=1")
    expect(content.locator("a")).to_have_attribute("rel", "noopener noreferrer nofollow")
    expect(content.locator("ol > li")).to_have_count(2)
    expect(content.locator("ol > li > ul > li")).to_have_text("inner")
    expect(content.locator("td")).to_have_text(["Emperor", "4,200"])
    expect(content.locator("td.align-right")).to_have_text("4,200")
    expect(content.locator("blockquote")).to_have_text("quoted")
    expect(content.locator("pre code")).to_have_text("def depth(x):\n    return x * 2 < 10")


def test_formulas_are_drawn_and_prices_are_not(page, stage):
    stage.say(
        r"So \(x = \frac{-b \pm \sqrt{b^2-4ac}}{2a}\), a $5 note and $6 more, $x_1$."
        "\n\n"
        r"\[\boxed{\sum_{i=1}^n i}\]"
    )
    send(page, "Solve")
    expect(page.locator(".stats")).to_be_visible()
    content = page.locator(".content")
    expect(content.locator("math")).to_have_count(3)
    expect(content.locator("math mfrac msqrt msup")).to_have_count(1)
    expect(content.locator("math[display=block] munderover")).to_have_count(1)
    expect(content).to_contain_text("a $5 note and $6 more")


def test_hostile_markup_stays_inert(page, stage):
    stage.say(HOSTILE, reasoning=HOSTILE)
    send(page, '<img src=x onerror="window.hit = 1">')
    expect(page.locator(".stats")).to_be_visible()
    page.locator("details.reasoning summary").click()
    assert page.evaluate("window.hit") is None
    expect(page.locator(".prose img, .prose script, .bubble img, #conversation-list img")).to_have_count(0)
    addresses = page.locator(".prose a").evaluate_all("links => links.map(link => link.protocol)")
    assert addresses and set(addresses) == {"https:"}
    assert page.locator(".prose [onclick], .prose [onerror]").count() == 0
    expect(page.locator(".content")).to_contain_text("[a](javascript:window.hit=1)")


def test_awkward_text_is_rendered_quickly_and_completely(page):
    """Inputs that make naive parsers quadratic or deep; the text must still all be there."""
    lengths = page.evaluate(
        """async () => {
            const { render } = await import("/console/markdown.js");
            const inputs = ["*a ".repeat(8000), "[".repeat(20000), "[a](".repeat(8000), "`".repeat(9999) + " `` ",
                ">".repeat(9000), "- ".repeat(4000) + "x", "# " + " ".repeat(20000) + "x", "**a _b ".repeat(5000),
                "```" + " ".repeat(20000) + "x", "|a".repeat(3000) + "\\n|-|", "***a*** b_c_d 2*3*4 \\\\*",
                "~~~\\nopen", "42.", "$a ".repeat(9000),
                "\\\\(" + "{".repeat(3000) + "\\\\)", "\\\\(" + "\\\\frac".repeat(500) + "\\\\)"];
            return inputs.map((input) => {
                const box = document.createElement("div");
                render(box, input, { copyCode: "", code: "" });
                return box.textContent.length;
            });
        }"""
    )
    assert lengths[0] == len("*a ") * 8000 - 1
    assert min(lengths) > 0


def test_events_are_read_however_the_network_cuts_them(page):
    read = page.evaluate(
        """async () => {
            const { parseEvents } = await import("/console/api.js");
            const text = 'data: {"a": 1}\\r\\n\\r\\n: keep-alive\\n\\ndata:two\\ndata: lines\\n\\n' +
                'event: x\\nid: 7\\ndata: 深\\n\\ndata: [DONE]\\n\\n';
            const seen = new Set();
            for (let cut = 0; cut <= text.length; cut += 1) {
                const first = parseEvents(text.slice(0, cut));
                const second = parseEvents(first.rest + text.slice(cut));
                seen.add(JSON.stringify([...first.events, ...second.events, second.rest]));
            }
            return [...seen];
        }"""
    )
    assert [json.loads(each) for each in read] == [['{"a": 1}', "two\nlines", "深", "[DONE]", ""]]


def test_copy_a_message_and_a_code_block(open_page, stage):
    page = open_page("/", permissions=["clipboard-read", "clipboard-write"])
    stage.say("Run:\n\n```sh\nmake serve\n```")
    send(page, "How?")
    expect(page.locator(".stats")).to_be_visible()
    page.locator(".message.assistant [data-action=copy]").click()
    expect(page.locator("#status")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "Run:\n\n```sh\nmake serve\n```"
    page.get_by_role("button", name="Copy code").click()
    page.wait_for_function("navigator.clipboard.readText().then((text) => text === 'make serve')")


def test_chinese_is_chosen_by_the_browser_and_switched_and_kept(open_page, stage):
    page = open_page("/", locale="zh-CN")
    expect(page.locator("html")).to_have_attribute("lang", "zh-CN")
    expect(page.locator("#new-chat")).to_have_text("新对话")
    stage.say("**深海**。很深。", reasoning="想一想")
    send(page, "海有多深？")
    expect(page.locator(".content strong")).to_have_text("深海")
    expect(page.locator("details.reasoning summary")).to_contain_text("思考了")
    page.locator("#language").click()
    expect(page.locator("html")).to_have_attribute("lang", "en")
    expect(page.locator("#new-chat")).to_have_text("New chat")
    expect(page.locator(".stats")).to_contain_text("tokens")
    page.reload()
    expect(page.locator("html")).to_have_attribute("lang", "en")


def test_both_languages_have_every_text(page):
    missing = page.evaluate(
        """async () => {
            const { words } = await import("/console/words.js");
            const holes = (text) => (text.match(/\\{\\w+\\}/g) ?? []).sort().join();
            const keys = new Set([...Object.keys(words.en), ...Object.keys(words.zh)]);
            const same = (en, zh) => en && zh && holes(en) === holes(zh);
            return [...keys].filter((key) => !same(words.en[key], words.zh[key]));
        }"""
    )
    assert missing == []


def test_dark_follows_the_system_and_the_choice_is_kept(open_page):
    page = open_page("/", color_scheme="dark")
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    page.emulate_media(color_scheme="light")
    expect(page.locator("html")).to_have_attribute("data-theme", "light")
    page.locator("#theme").click()
    page.locator("#theme").click()
    expect(page.locator("#theme")).to_have_text("Dark")
    page.reload()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_texts_have_enough_contrast(open_page, stage, theme):
    """WCAG AA (4.5:1) for every visible text on its own background."""
    page = open_page("/", color_scheme=theme)
    page.locator("#toggle-settings").click()
    page.get_by_label("Longest answer (tokens)").fill(str(len(MARKDOWN)))
    stage.say(MARKDOWN, reasoning="Hm.")
    send(page, "Tell me")
    expect(page.locator(".stats")).to_be_visible()
    page.locator("details.reasoning summary").click()
    assert page.evaluate(CONTRAST_SCRIPT) == []


CONTRAST_SCRIPT = """() => {
    const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
        .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const ground = (node) => {
        for (; node; node = node.parentElement) {
            const colour = numbers(getComputedStyle(node).backgroundColor);
            if (colour[3] !== 0) return colour;
        }
    };
    const weak = [];
    for (const node of document.querySelectorAll("body *")) {
        const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
        if (!own || !node.checkVisibility() || node.closest(".visually-hidden, noscript, :disabled")) continue;
        const [a, b] = [light(numbers(getComputedStyle(node).color)), light(ground(node))];
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (ratio < 4.5) weak.push([node.tagName, node.className, node.textContent.slice(0, 30), ratio.toFixed(2)]);
    }
    return weak;
}"""


def test_a_phone_shows_everything_without_sideways_scrolling(open_page, stage):
    page = open_page("/", viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    wide = (
        "document.documentElement.scrollWidth > innerWidth || document.querySelector('#log').scrollWidth > innerWidth"
    )
    assert not page.evaluate(wide)
    stage.say(MARKDOWN + "\n\n```\n" + "x" * 200 + "\n```\n\n" + "longword" * 30)
    send(page, "https://example.org/" + "a" * 120)
    expect(page.locator(".stats")).to_be_attached()
    assert not page.evaluate(wide)
    expect(page.locator("#sidebar")).to_be_hidden()
    page.locator("#toggle-sidebar").tap()
    expect(page.locator("#conversation-list .open")).to_be_visible()
    page.locator("#new-chat").tap()
    expect(page.locator("#sidebar")).to_be_hidden()
    page.locator("#toggle-settings").tap()
    expect(page.get_by_label("Temperature")).to_be_visible()
    assert not page.evaluate(wide)
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()


def test_enter_while_an_input_method_composes_does_not_send(page, stage):
    box = page.locator("#composer-input")
    box.focus()
    session = page.context.new_cdp_session(page)
    session.send("Input.imeSetComposition", {"text": "nihao", "selectionStart": 5, "selectionEnd": 5})
    page.keyboard.press("Enter")
    box.dispatch_event("keydown", {"key": "Enter", "isComposing": True, "bubbles": True})
    box.dispatch_event("keydown", {"key": "Enter", "keyCode": 229, "bubbles": True})
    expect(page.locator(".message")).to_have_count(0)
    assert stage.requests == []
    session.send("Input.insertText", {"text": "你好"})
    page.keyboard.press("Enter")
    expect(page.locator(".bubble")).to_have_text("你好")


def test_keys(page, stage):
    box = page.locator("#composer-input")
    page.locator("#title").click()
    page.keyboard.press("/")
    expect(box).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    expect(box).to_have_value("one\ntwo")
    page.keyboard.press("Enter")
    expect(page.locator(".bubble")).to_have_text("one\ntwo")
    expect(page.locator(".stats")).to_be_visible()
    page.keyboard.press("ArrowUp")
    expect(page.get_by_label("Edit the message")).to_have_value("one\ntwo")
    page.keyboard.press("Escape")
    expect(page.locator(".bubble")).to_have_text("one\ntwo")
    page.keyboard.press("Control+Shift+O")
    expect(page.locator("#welcome")).to_be_visible()
    expect(box).to_be_focused()


def test_parameters_are_sent_checked_and_kept(page, stage):
    page.locator("#toggle-settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Top p").fill("0.9")
    page.get_by_label("Longest answer (tokens)").fill("77")
    page.get_by_label("Seed").fill("7")
    page.locator("#think").click()
    expect(page.get_by_role("switch")).not_to_be_checked()
    page.reload()
    expect(page.locator("#think")).to_have_attribute("aria-pressed", "false")
    send(page, "Hi")
    expect(page.locator(".stats")).to_be_visible()
    asked = stage.requests[0]
    assert asked["messages"][0] == {"role": "system", "content": "Be brief."}
    assert [asked[name] for name in ("temperature", "top_p", "max_tokens", "seed")] == [0.5, 0.9, 77, 7]
    assert asked["chat_template_kwargs"] == {"thinking": False}
    page.locator("#toggle-settings").click()
    page.get_by_label("Temperature").fill("5")
    expect(page.get_by_label("Temperature")).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#temperature-hint")).to_contain_text("0 to 2")
    page.get_by_role("button", name="Back to defaults").click()
    send(page, "Again")
    expect(page.locator(".stats")).to_have_count(2)
    assert not {"temperature", "top_p", "max_tokens", "seed"} & set(stage.requests[1])


def test_every_control_has_a_name(page, stage):
    send(page, "Hi")
    expect(page.locator(".stats")).to_be_visible()
    page.locator("#toggle-settings").click()
    unnamed = page.locator("button, input, textarea, select").evaluate_all(
        """(all) => all
            .filter((each) => !each.ariaLabel && !each.textContent.trim() && !each.labels?.length)
            .map((each) => each.outerHTML)"""
    )
    assert unnamed == []
