"""Skill `masking`: write a text again with names, telephone numbers, identity numbers and e-mail addresses
masked.

All else is copied exactly, numbers that are not personal (rooms, sums, dates) included. Called by
`training.skills`.
"""

from __future__ import annotations

from random import Random

from seamount.training.skills.item import Item, question
from seamount.training.skills.pools import (
    CITIES,
    below,
    code,
    date,
    digits,
    email,
    identity,
    person,
    phone,
)

NAME = "masking"

MASKS = {
    "en": {"name": "[NAME]", "phone": "[PHONE]", "id": "[ID]", "email": "[EMAIL]"},
    "zh": {"name": "[姓名]", "phone": "[电话]", "id": "[证件号]", "email": "[邮箱]"},
}
_ASK = {
    "en": (
        "Mask the personal data: {}", "Mask personal data in this text: {}", "Anonymise: {}",
        "Remove the personal data from this text.\n{}", "{}\nMask names, phones, IDs and e-mails.",
        "Please mask all personal data.\n{}", "Hide the personal data: {}", "{}\nMask the personal data.",
    ),
    "zh": (
        "请给下面的文字脱敏：{}", "隐去个人信息：{}", "脱敏：{}", "请遮盖个人信息。\n{}", "{}\n请把个人信息脱敏。",
        "把姓名、电话、证件号和邮箱遮盖掉：{}", "请隐藏这段文字中的个人信息。\n{}", "{}\n对以上文字做脱敏处理。",
    ),
}  # fmt: skip
# Slots: {name} {phone} {id} {email} are masked; {date} {amount} {number} {code} {city} are kept.
_SENTENCES = {
    "en": (
        "{name} called from {phone} on {date}.", "Please ring {name} at {phone}.", "The ID of {name} is {id}.",
        "Send the report to {email}.", "{name} can be reached at {email} or {phone}.",
        "Patient {name}, ID {id}, was moved to room {number}.", "{name} paid {amount} dollars on {date}.",
        "The contract with {name} was signed in {city}.", "Write to {name} at {email} before {date}.",
        "Account holder: {name}, phone {phone}.", "Machine {code} was repaired by {name}.",
        "Customer {name} with ID {id} asked for a loan of {amount} dollars.", "The meeting is on {date} in {city}.",
        "Contact: {name}, {phone}, {email}.", "Parcel {code} goes to {name} in {city}.",
        "We tried {phone} but nobody answered.", "ID {id} was checked on {date}.",
        "Dr. {name} will see {name} on {date}.", "{name} and {name} work on line {number}.",
        "Invoice {code} over {amount} dollars is for {name}.", "Her new number is {phone}.",
        "Room {number} is free from {date}.", "For questions write to {email}.",
        "{name} from {city} lost card {code}.", "The nurse {name} noted {number} visits.",
        "Applicant: {name}. ID: {id}. Phone: {phone}.", "Mr. {name} lives in {city}.", "Ask {name} for form {code}.",
        "The bill of {amount} dollars is still open.", "Emergency contact is {name}, {phone}.",
    ),
    "zh": (
        "{name}于{date}来电，号码是{phone}。", "请致电{name}，电话{phone}。", "{name}的身份证号是{id}。",
        "报告请发到{email}。", "可以通过{email}或{phone}联系{name}。", "患者{name}，证件号{id}，已转到{number}号病房。",
        "{name}在{date}支付了{amount}元。", "与{name}的合同在{city}签订。", "请在{date}之前写信给{name}，邮箱{email}。",
        "开户人：{name}，电话：{phone}。", "设备{code}由{name}维修。", "客户{name}（证件号{id}）申请贷款{amount}元。",
        "会议定于{date}在{city}召开。", "联系人：{name}，{phone}，{email}。", "包裹{code}寄给{city}的{name}。",
        "我们拨打了{phone}，无人接听。", "证件{id}已在{date}核验。", "{name}医生将在{date}为{name}看诊。",
        "{name}和{name}在{number}号线工作。", "发票{code}共{amount}元，开给{name}。", "她的新号码是{phone}。",
        "{number}号房从{date}起空出。", "有问题请写信到{email}。", "来自{city}的{name}丢失了卡片{code}。",
        "护士{name}记录了{number}次探视。", "申请人：{name}。证件号：{id}。电话：{phone}。", "{name}先生住在{city}。",
        "表格{code}请找{name}领取。", "{amount}元的账单尚未结清。", "紧急联系人是{name}，{phone}。",
    ),
}  # fmt: skip


def make(rng: Random, language: str) -> Item:
    """One to three sentences with at least one thing to mask, or (one in twelve) nothing to mask."""
    sentences = _SENTENCES[language]
    while True:
        count = (1, 1, 2, 2, 2, 3)[int(rng.random() * 6)]
        used = [int(rng.random() * len(sentences)) for _ in range(count)]
        template = ("" if language == "zh" else " ").join(sentences[index] for index in used)
        if any("{" + kind in template for kind in MASKS["en"]) or rng.random() < 0.5:
            break
    text, masked, values = _fill(rng, language, template)
    ask = _ASK[language]
    wording = ask[int(rng.random() * len(ask))]
    return question(NAME, language, f"{used}:{values}", wording.format(text), masked)


def _fill(rng: Random, language: str, template: str) -> tuple[str, str, str]:
    """The filled text, the same with personal data masked, and the drawn values joined by `|`."""
    masks = MASKS[language]
    text, masked, values = [], [], []
    for piece in template.split("{"):
        slot, found, tail = piece.partition("}")
        if not found:  # what stands before the first slot
            text.append(piece)
            masked.append(piece)
            continue
        value = _draw(rng, language, slot)
        values.append(value)
        text.append(value + tail)
        masked.append(masks.get(slot, value) + tail)
    return "".join(text), "".join(masked), "|".join(values)


def _draw(rng: Random, language: str, slot: str) -> str:
    match slot:
        case "name":
            return person(rng, language)
        case "phone":
            return phone(rng, language)
        case "id":
            return identity(rng, language)
        case "email":
            return email(rng)
        case "date":
            return date(rng, language)
        case "amount":
            return digits(rng, below(rng, 2, 5))
        case "number":
            return str(below(rng, 2, 60))
        case "code":
            return code(rng)
        case "city":
            return CITIES[int(rng.random() * len(CITIES))][language == "zh"]
        case _:
            raise ValueError(f"no such slot: {slot!r}")
