"""Skill `extraction`: the asked fields of a short clinical, bank or factory note as compact JSON.

A note is a shuffled chain of clauses, one for each fact; the user names three to five of the facts and the
answer copies them in the order asked, null for a fact that the note does not hold. Called by
`training.skills`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from seamount.training.skills.item import Item, question
from seamount.training.skills.pools import CITIES, below, choice, code, date, digits, person

NAME = "extraction"

_ASK = {
    "en": (
        "Extract {fields} as JSON: {note}",
        "{note}\nGive {fields} as JSON.",
        "{note}\nExtract as JSON: {fields}",
        "From this note return JSON with {fields}. {note}",
        "Fields: {fields}\nNote: {note}",
        "Read the note and output {fields} as JSON.\n{note}",
    ),
    "zh": (
        "从记录中提取{fields}，用JSON输出：{note}",
        "{note}\n请用JSON给出{fields}。",
        "{note}\n提取字段：{fields}",
        "请提取{fields}，返回JSON。\n{note}",
        "字段：{fields}\n记录：{note}",
        "阅读下面的记录，以JSON格式输出{fields}。\n{note}",
    ),
}
_SEPARATORS = {"en": (", ", "; ", ". "), "zh": ("，", "；", "。")}

Value = str | int
Draw = Callable[[Random, str], Value]


def _words(english: str, chinese: str) -> Draw:
    """A draw from two parallel lists, entries parted by a comma."""
    lists = {"en": english.split(", "), "zh": chinese.split("、")}
    if len(lists["en"]) != len(lists["zh"]):
        raise ValueError(f"unequal lists: {english!r}")
    return lambda rng, language: choice(rng, lists[language])


def _number(low: int, high: int) -> Draw:
    return lambda rng, language: below(rng, low, high)


def _amount(rng: Random, language: str) -> int:
    return int(digits(rng, below(rng, 2, 5)))


def _clock(rng: Random, language: str) -> str:
    return f"{below(rng, 0, 23):02}:{below(rng, 0, 11) * 5:02}"


def _temperature(rng: Random, language: str) -> str:
    return f"{below(rng, 36, 40)}.{below(rng, 0, 9)}"


def _pressure(rng: Random, language: str) -> str:
    return f"{below(rng, 95, 185)}/{below(rng, 55, 110)}"


def _label(rng: Random, language: str) -> str:
    return code(rng)


def _city(rng: Random, language: str) -> str:
    return CITIES[int(rng.random() * len(CITIES))][language == "zh"]


@dataclass(frozen=True, slots=True)
class _Field:
    """A fact: its JSON name and its clauses in each language, and how its value is drawn."""

    names: dict[str, str]
    clauses: dict[str, tuple[str, ...]]
    draw: Draw


def _field(en: str, zh: str, draw: Draw, en_clauses: str, zh_clauses: str) -> _Field:
    return _Field(
        {"en": en, "zh": zh},
        {"en": tuple(en_clauses.split("|")), "zh": tuple(zh_clauses.split("|"))},
        draw,
    )


# The first field of each domain opens the note (who or what it is about); the others follow in any order.
_DOMAINS: tuple[tuple[_Field, ...], ...] = (
    (
        _field("name", "姓名", person, "Patient {}|Seen today: {}|Pt. {}", "患者{}|病人{}|姓名{}"),
        _field("age", "年龄", _number(18, 95), "{} years old|age {}|aged {}", "{}岁|年龄{}"),
        _field("ward", "病区", _words(
            "cardiology, surgery, neurology, oncology, pediatrics, emergency, urology, dermatology, orthopedics",
            "心内科、外科、神经科、肿瘤科、儿科、急诊科、泌尿科、皮肤科、骨科"),
            "ward {}|admitted to {}|lies in {}", "住{}|收入{}|病区{}"),
        _field("complaint", "主诉", _words(
            "chest pain, fever, dry cough, headache, back pain, dizziness, nausea, knee pain, rash, sore throat, "
            "short breath, stomach pain, fatigue, blurred vision",
            "胸痛、发热、干咳、头痛、背痛、头晕、恶心、膝盖痛、皮疹、咽痛、气短、腹痛、乏力、视物模糊"),
            "complains of {}|reports {}|has {}", "主诉{}|自述{}|因{}就诊"),
        _field("temperature", "体温", _temperature, "temperature {}|temp {}|{} degrees", "体温{}|体温{}度"),
        _field("blood_pressure", "血压", _pressure, "blood pressure {}|BP {}", "血压{}|血压为{}"),
        _field("drug", "药品", _words(
            "aspirin, ibuprofen, metformin, amoxicillin, insulin, heparin, paracetamol, atorvastatin, omeprazole, "
            "lisinopril, warfarin, cetirizine",
            "阿司匹林、布洛芬、二甲双胍、阿莫西林、胰岛素、肝素、对乙酰氨基酚、阿托伐他汀、奥美拉唑、赖诺普利、华法林、"
            "西替利嗪"),
            "given {}|prescribed {}|takes {}", "给予{}|服用{}|开具{}"),
        _field("bed", "床号", _number(1, 60), "bed {}|in bed {}", "{}床|床号{}"),
        _field("doctor", "医生", person, "seen by Dr. {}|doctor {}|under Dr. {}", "主治医生{}|医生{}|接诊医生{}"),
        _field("date", "日期", date, "on {}|dated {}|visit on {}", "{}就诊|日期{}|于{}入院"),
    ),
    (
        _field("customer", "客户", person, "Customer {}|Client {}|{} came in", "客户{}|储户{}|{}来办理业务"),
        _field("account", "账号", lambda rng, language: digits(rng, below(rng, 6, 8)),
               "account {}|account number {}|acct {}", "账号{}|账户{}|账号为{}"),
        _field("amount", "金额", _amount, "amount {}|sum of {}|for {} dollars", "金额{}元|共{}元|金额{}"),
        _field("branch", "网点", _city, "branch {}|at the {} branch|office {}", "{}支行|网点{}|在{}网点"),
        _field("type", "类型", _words(
            "deposit, withdrawal, transfer, loan, payment, refund, exchange, mortgage",
            "存款、取款、转账、贷款、缴费、退款、换汇、按揭"),
            "a {}|type {}|asks for a {}", "办理{}|业务类型{}|申请{}"),
        _field("date", "日期", date, "on {}|dated {}|value date {}", "{}办理|日期{}|起息日{}"),
        _field("payee", "收款人", person, "to {}|payee {}|in favour of {}", "收款人{}|收款方{}|转给{}"),
        _field("officer", "经办人", person, "handled by {}|officer {}|clerk {}", "经办人{}|由{}经办|柜员{}"),
        _field("reference", "编号", _label, "reference {}|ref {}|number {}", "编号{}|流水号{}|参考号{}"),
        _field("time", "时间", _clock, "at {}|time {}", "时间{}|{}受理"),
    ),
    (
        _field("machine", "设备", _label, "Machine {}|Unit {}|{} stopped", "设备{}|机器{}|{}停机"),
        _field("line", "产线", _number(1, 12), "line {}|on line {}", "{}号线|产线{}"),
        _field("fault", "故障", _words(
            "oil leak, overheating, worn belt, loud noise, broken bearing, sensor error, low pressure, blocked valve, "
            "vibration, short circuit, loose bolt, cracked gear",
            "漏油、过热、皮带磨损、异响、轴承损坏、传感器故障、压力偏低、阀门堵塞、振动、短路、螺栓松动、齿轮开裂"),
            "fault: {}|shows {}|reported {}", "故障为{}|出现{}|报修{}"),
        _field("part", "备件", _words(
            "bearing, belt, pump, valve, motor, filter, seal, sensor, fuse, gearbox, nozzle, relay",
            "轴承、皮带、水泵、阀门、电机、滤芯、密封圈、传感器、保险丝、齿轮箱、喷嘴、继电器"),
            "needs a new {}|replaced the {}|part {}", "需要更换{}|更换了{}|备件{}"),
        _field("technician", "技术员", person, "technician {}|checked by {}|repaired by {}",
               "技术员{}|由{}检查|维修人{}"),
        _field("shift", "班次", _words("early, late, night", "早班、中班、夜班"), "{} shift|shift {}", "{}|班次{}"),
        _field("downtime", "停机", _number(5, 240), "{} minutes down|down for {} minutes|stopped {} min",
               "停机{}分钟|停了{}分钟"),
        _field("order", "工单", lambda rng, language: digits(rng, below(rng, 4, 6)),
               "order {}|work order {}|job {}", "工单{}|工单号{}|单号{}"),
        _field("date", "日期", date, "on {}|dated {}", "日期{}|{}发生"),
        _field("temperature", "温度", _number(20, 190), "{} degrees|temperature {}|at {} C", "温度{}度|温度{}"),
    ),
)  # fmt: skip


def make(rng: Random, language: str) -> Item:
    """A note of four to six facts and a question for three to five of them; one that is missing is null."""
    domain_index = int(rng.random() * len(_DOMAINS))
    domain = _DOMAINS[domain_index]
    rest = rng.sample(range(1, len(domain)), below(rng, 3, 4) + (rng.random() < 0.3))
    used = [0, *rest]
    values = {index: domain[index].draw(rng, language) for index in used}
    separators = _SEPARATORS[language]
    separator = separators[0] if rng.random() < 0.7 else separators[int(rng.random() * 3)]
    clauses = [choice(rng, domain[index].clauses[language]).format(values[index]) for index in used]
    if separator in (". ", "。"):
        clauses = [clause[0].upper() + clause[1:] for clause in clauses]
    note = separator.join(clauses) + ("。" if language == "zh" else ".")

    asked = rng.sample(used, min(len(used), (3, 3, 4, 4, 5)[int(rng.random() * 5)]))
    if rng.random() < 0.1:  # one field that the note does not hold
        absent = rng.choice([index for index in range(len(domain)) if index not in values])
        asked[int(rng.random() * len(asked))] = absent
    names = [domain[index].names[language] for index in asked]
    fields = ("、" if language == "zh" else ", ").join(names)
    wording = _ASK[language]
    text = wording[int(rng.random() * len(wording))].format(fields=fields, note=note)
    answer = {domain[index].names[language]: values.get(index) for index in asked}
    key = f"{domain_index}:{asked}:" + "|".join(str(values[index]) for index in used)
    return question(NAME, language, key, text, dump(answer))


def dump(value: object) -> str:
    """JSON in the spelling that this skill and the tool calls are written in."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
