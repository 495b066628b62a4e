# ruff: noqa: E501 - tables of wordings are read best with a wording on one line
"""Skill `tools`: choose the one tool of a given list that fits the request and copy its arguments.

Tools are put together from families (read a value, set a value, book, cancel, order, ...) and things of
hospital, bank, factory and household, so no single name can be learned by heart. Some requests fit none of
the tools; some conversations end with the tool's result to be told. Called by `training.skills`.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from seamount.training.skills.extraction import dump
from seamount.training.skills.item import Item, Message, Tool
from seamount.training.skills.pools import CITIES, below, choice, code, date, digits, person

NAME = "tools"

REFUSAL = {"en": "None of the given tools can do that.", "zh": "给定的工具都做不到。"}
RESULT = {"en": "The result is: {}.", "zh": "结果是：{}。"}


@dataclass(frozen=True, slots=True)
class _Family:
    """Tools of one kind. `{t}` is the thing; the parameters are what the wordings name, besides `{t}` and `{a}`."""

    names: tuple[str, ...]
    parameters: tuple[str, ...]
    things: str
    about: tuple[str, str]
    asks: tuple[str, str]


_FAMILIES: tuple[_Family, ...] = (
    _Family(("get_{t}_{a}", "read_{t}_{a}"), ("id",), "devices", ("Read the {a} of a {t}", "读取{t}的{a}"),
            ("What is the {a} of {t} {id}?|Read the {a} of {t} {id}.|Show me the {a} of {t} {id}.",
             "{t}{id}的{a}是多少？|读取{t}{id}的{a}。|查一下{t}{id}的{a}。")),
    _Family(("set_{t}_{a}", "change_{t}_{a}"), ("id", "value"), "devices", ("Set the {a} of a {t}", "设置{t}的{a}"),
            ("Set the {a} of {t} {id} to {value}.|Change {t} {id}: {a} {value}.|Please put the {a} of {t} {id} at {value}.",
             "把{t}{id}的{a}设为{value}。|将{t}{id}的{a}调到{value}。|请把{t}{id}的{a}改成{value}。")),
    _Family(("start_{t}", "turn_on_{t}"), ("id",), "devices", ("Start a {t}", "启动{t}"),
            ("Start {t} {id}.|Please turn on {t} {id}.|Switch on {t} {id} now.", "启动{t}{id}。|请打开{t}{id}。|现在开启{t}{id}。")),
    _Family(("stop_{t}", "turn_off_{t}"), ("id",), "devices", ("Stop a {t}", "停止{t}"),
            ("Stop {t} {id}.|Please turn off {t} {id}.|Switch off {t} {id} now.", "停止{t}{id}。|请关闭{t}{id}。|现在关掉{t}{id}。")),
    _Family(("repair_{t}", "request_{t}_repair"), ("id", "date"), "devices", ("Plan the repair of a {t}", "安排{t}维修"),
            ("Plan a repair of {t} {id} on {date}.|{t} {id} must be repaired on {date}.",
             "安排{date}维修{t}{id}。|{t}{id}需要在{date}维修。")),
    _Family(("book_{t}", "reserve_{t}"), ("name", "date"), "bookable", ("Book a {t}", "预订{t}"),
            ("Book a {t} for {name} on {date}.|Reserve a {t} on {date} for {name}.|{name} needs a {t} on {date}.",
             "为{name}预订{date}的{t}。|请在{date}给{name}预约{t}。|{name}在{date}需要{t}。")),
    _Family(("cancel_{t}", "delete_{t}"), ("id",), "cases", ("Cancel a {t}", "取消{t}"),
            ("Cancel {t} {id}.|Please cancel {t} {id}.|{t} {id} is no longer needed, cancel it.",
             "取消{t}{id}。|请取消{t}{id}。|不再需要{t}{id}，请取消。")),
    _Family(("get_{t}_status", "track_{t}"), ("id",), "cases", ("Get the status of a {t}", "查询{t}状态"),
            ("What is the status of {t} {id}?|Where is {t} {id} now?|Check {t} {id}.",
             "{t}{id}的状态是什么？|{t}{id}到哪一步了？|查询{t}{id}。")),
    _Family(("create_{t}", "open_{t}"), ("name",), "cases", ("Create a {t}", "新建{t}"),
            ("Create a {t} for {name}.|Open a new {t} for {name}.|{name} wants a new {t}.",
             "为{name}新建{t}。|给{name}开一个新的{t}。|{name}想要一个新的{t}。")),
    _Family(("send_{t}", "mail_{t}"), ("name",), "papers", ("Send a {t} to a person", "发送{t}"),
            ("Send the {t} to {name}.|Please mail the {t} to {name}.|{name} should get the {t}.",
             "把{t}发给{name}。|请将{t}寄给{name}。|{name}应该收到{t}。")),
    _Family(("print_{t}",), ("id", "count"), "papers", ("Print a {t}", "打印{t}"),
            ("Print {count} copies of {t} {id}.|I need {t} {id} printed {count} times.", "打印{count}份{t}{id}。|{t}{id}需要打印{count}份。")),
    _Family(("order_{t}", "buy_{t}"), ("count", "city"), "goods", ("Order {t}", "订购{t}"),
            ("Order {count} {t} for {city}.|We need {count} {t} in {city}.|Buy {count} {t}, deliver to {city}.",
             "为{city}订购{count}件{t}。|{city}需要{count}件{t}。|买{count}件{t}，送到{city}。")),
    _Family(("count_{t}", "get_{t}_stock"), ("city",), "goods", ("Count the {t} in a city", "查询某地{t}库存"),
            ("How many {t} are in {city}?|Count the {t} in {city}.", "{city}有多少{t}？|清点{city}的{t}。")),
    _Family(("get_{t}",), ("city",), "readings", ("Get the {t} of a city", "查询城市的{t}"),
            ("What is the {t} in {city}?|Tell me the {t} for {city}.|{t} in {city}?", "{city}的{t}是什么？|告诉我{city}的{t}。|{city}{t}？")),
    _Family(("transfer_{t}", "move_{t}"), ("amount", "name"), "money", ("Transfer {t} to a person", "转移{t}"),
            ("Transfer {amount} from {t} to {name}.|Send {name} {amount} from {t}.", "从{t}转{amount}给{name}。|用{t}给{name}转{amount}。")),
    _Family(("get_{t}_balance", "check_{t}"), ("id",), "money", ("Get the balance of {t}", "查询{t}余额"),
            ("What is the balance of {t} {id}?|How much is left on {t} {id}?", "{t}{id}的余额是多少？|{t}{id}还剩多少？")),
    _Family(("remind_{t}", "notify_{t}"), ("date", "time"), "people", ("Remind a {t}", "提醒{t}"),
            ("Remind the {t} on {date} at {time}.|Tell the {t} about it on {date}, {time}.",
             "在{date}{time}提醒{t}。|{date}{time}通知{t}。")),
    _Family(("find_{t}", "search_{t}"), ("city",), "people", ("Find a {t} in a city", "查找某地的{t}"),
            ("Find a {t} in {city}.|I am looking for a {t} in {city}.", "在{city}找一位{t}。|我想在{city}找{t}。")),
)  # fmt: skip


def _things(english: str, chinese: str) -> tuple[tuple[str, str], ...]:
    left, right = english.split(" "), chinese.split("、")
    if len(left) != len(right):
        raise ValueError(f"unequal lists: {english!r}")
    return tuple(zip(left, right, strict=True))


_THINGS = {
    "devices": _things(
        "pump valve heater lamp boiler fan motor oven robot press scanner printer mixer freezer monitor lift gate drill",
        "水泵、阀门、加热器、灯、锅炉、风扇、电机、烤箱、机器人、压力机、扫描仪、打印机、搅拌机、冷柜、监护仪、电梯、闸门、钻机",
    ),
    "bookable": _things(
        "bed room table car taxi hall desk ticket flight hotel nurse surgery appointment",
        "床位、房间、餐桌、汽车、出租车、大厅、工位、车票、航班、酒店、护士、手术、门诊",
    ),
    "cases": _things(
        "order loan claim visit shipment booking card account contract ticket parcel transfer",
        "订单、贷款、理赔、探访、货运、预约、卡片、账户、合同、工单、包裹、转账",
    ),
    "papers": _things(
        "report invoice receipt letter form bill plan statement certificate prescription label manual",
        "报告、发票、收据、信件、表格、账单、计划、对账单、证书、处方、标签、手册",
    ),
    "goods": _things(
        "masks gloves bolts belts filters bandages syringes chairs bottles helmets batteries cables screws boxes",
        "口罩、手套、螺栓、皮带、滤芯、绷带、注射器、椅子、瓶子、头盔、电池、电缆、螺丝、箱子",
    ),
    "readings": _things(
        "weather temperature humidity forecast timezone traffic population",
        "天气、气温、湿度、预报、时区、路况、人口",
    ),
    "money": _things(
        "savings checking credit budget fund wallet", "储蓄账户、活期账户、信用账户、预算账户、基金账户、钱包"
    ),
    "people": _things(
        "doctor nurse plumber lawyer teacher driver engineer technician dentist cook",
        "医生、护士、水管工、律师、老师、司机、工程师、技术员、牙医、厨师",
    ),
}
_ATTRIBUTES = _things(
    "pressure speed level temperature voltage power humidity load flow",
    "压力、转速、液位、温度、电压、功率、湿度、负载、流量",
)
# Spellings of each parameter's name; the list of a tool says which one counts.
_PARAMETERS: dict[str, tuple[str, ...]] = {
    "id": ("id", "{t}_id", "code", "{t}", "number"),
    "value": ("value", "{a}", "target", "level"),
    "name": ("name", "person", "recipient", "customer", "user"),
    "date": ("date", "day", "when"),
    "count": ("count", "quantity", "amount"),
    "city": ("city", "place", "location"),
    "amount": ("amount", "sum"),
    "time": ("time", "hour", "at"),
}
_INTEGERS = frozenset(("value", "count", "amount"))
_RESULTS = {
    "en": ("done", "ok", "not found", "ready", "open", "closed", "sent", "late"),
    "zh": ("已完成", "成功", "未找到", "就绪", "已打开", "已关闭", "已发送", "延迟"),
}


@dataclass(frozen=True, slots=True)
class _Made:
    """A drawn tool: its schema, which spelling each parameter has, and what it is about."""

    tool: Tool
    family: _Family
    spelled: dict[str, str]
    thing: tuple[str, str]
    attribute: tuple[str, str]


def _draw_tool(rng: Random, language: str) -> _Made:
    zh = language == "zh"
    family = _FAMILIES[int(rng.random() * len(_FAMILIES))]
    things = _THINGS[family.things]
    thing = things[int(rng.random() * len(things))]
    attribute = _ATTRIBUTES[int(rng.random() * len(_ATTRIBUTES))]
    name = choice(rng, family.names).format(t=thing[0], a=attribute[0])
    spelled: dict[str, str] = {}
    for parameter in family.parameters:
        spelling = choice(rng, _PARAMETERS[parameter]).format(t=thing[0], a=attribute[0])
        spelled[parameter] = parameter if spelling in spelled.values() else spelling
    properties = {
        spelling: {"type": "integer" if parameter in _INTEGERS else "string"} for parameter, spelling in spelled.items()
    }
    function = {
        "name": name,
        "description": _article(family.about[zh].format(t=thing[zh], a=attribute[zh]), thing[zh]),
        "parameters": {"type": "object", "properties": properties, "required": list(properties)},
    }
    return _Made({"type": "function", "function": function}, family, spelled, thing, attribute)


def _value(rng: Random, language: str, parameter: str) -> str | int:
    match parameter:
        case "id":
            return code(rng) if rng.random() < 0.7 else digits(rng, below(rng, 2, 5))
        case "value" | "count":
            return below(rng, 2, 99)
        case "amount":
            return int(digits(rng, below(rng, 2, 4)))
        case "name":
            return person(rng, language)
        case "date":
            return date(rng, language)
        case "time":
            return f"{below(rng, 0, 23):02}:{below(rng, 0, 11) * 5:02}"
        case _:
            return CITIES[int(rng.random() * len(CITIES))][language == "zh"]


def make(rng: Random, language: str) -> Item:
    """A request with one to four tools: a call (most), a refusal, or the telling of a result."""
    zh = language == "zh"
    wanted = _draw_tool(rng, language)
    values = {parameter: _value(rng, language, parameter) for parameter in wanted.family.parameters}
    text = choice(rng, wanted.family.asks[zh].split("|"))
    text = text.format(t=wanted.thing[zh], a=wanted.attribute[zh], **values)
    text = _article(text[0].upper() + text[1:], wanted.thing[zh])
    kind = rng.random()
    refused = kind < 0.15

    tools: list[Tool] = [] if refused else [wanted.tool]
    others = (1, 1, 2, 2, 3)[int(rng.random() * 5)] if refused else (0, 1, 1, 2, 2, 3)[int(rng.random() * 6)]
    while len(tools) < others + (not refused):
        other = _draw_tool(rng, language)
        if _confusable(other, wanted, refused) or any(_name(other.tool) == _name(tool) for tool in tools):
            continue
        tools.insert(int(rng.random() * (len(tools) + 1)), other.tool)

    key = f"{_name(wanted.tool)}:{refused}:" + "|".join(map(str, values.values()))
    user: Message = {"role": "user", "content": text}
    if refused:
        answer: Message = {"role": "assistant", "content": REFUSAL[language]}
        return Item(NAME, language, (user, answer), tuple(tools), key)
    arguments = {spelling: values[parameter] for parameter, spelling in wanted.spelled.items()}
    call = tool_call(_name(wanted.tool), dump(arguments))
    if kind < 0.9:
        return Item(NAME, language, (user, call), tuple(tools), key)
    result = choice(rng, _RESULTS[language]) if rng.random() < 0.5 else digits(rng, below(rng, 1, 4))
    told: Message = {"role": "tool", "tool_call_id": "call_0", "content": dump({"result": result})}
    answer = {"role": "assistant", "content": RESULT[language].format(result)}
    return Item(NAME, language, (user, call, told, answer), tuple(tools), f"{key}={result}")


def make_refusal(rng: Random, language: str) -> Item:
    """As `make`, where none of the given tools fits."""
    while True:
        item = make(rng, language)
        if item.messages[-1]["content"] == REFUSAL[language]:
            return item


def tool_call(name: str, arguments: str) -> Message:
    """An assistant message that calls one function; `arguments` is JSON text."""
    function = {"name": name, "arguments": arguments}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "call_0", "type": "function", "function": function}],
    }


def _article(text: str, thing: str) -> str:
    """`a engine` becomes `an engine`; Chinese text is left as it is."""
    return text.replace(f" a {thing}", f" an {thing}") if thing[0] in "aeiou" else text


def _name(tool: Tool) -> str:
    return str(tool["function"]["name"])


def _confusable(other: _Made, wanted: _Made, refused: bool) -> bool:
    """Whether `other` could also answer the request, or (in a refusal) comes too near to it to be fair."""
    if refused:
        return other.thing == wanted.thing or other.family is wanted.family
    if other.thing != wanted.thing:
        return False
    return other.family is wanted.family and (
        "{a}" not in wanted.family.names[0] or other.attribute == wanted.attribute
    )
