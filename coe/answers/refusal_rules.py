"""Rules beside the refusal classifier, in ten languages: whole answers, "as an AI", quotations and translations.

All of them read folded text (`coe.answers.text.fold`).
"""

from __future__ import annotations

import re
from typing import Final

from coe.answers.stated import stated_answer

_MOST: Final = 80
"""Characters of a text that is nothing but such a phrase."""
_LEAST: Final = 3
"""Letters of a refusal."""
_WHOLE: Final = re.compile(
    r"""n\s?/\s?a|n/d|s/d|k\.\s?a
    |(?:it\s+is\s+|it's\s+)?(?:unknown|not\s+known|not\s+available)|unavailable|not\s+sure|unsure|no\s+clue
    |(?:there\s+is\s+)?(?:not\s+(?:enough|sufficient)|insufficient|no)\s+(?:information|info|data)(?:\s+(?:is\s+)?available)?
    |(?:es\s+ist\s+)?(?:unbekannt|nicht\s+bekannt|nicht\s+verfügbar)|keine\s+angaben?|(?:zu\s+wenige?
    |(?:es\s+gibt\s+)?(?:nicht\s+(?:genug|genügend|ausreichend)|unzureichende|keine))\s+(?:informationen|daten|angaben)
    (?:\s+(?:verfügbar|vorhanden))?
    |(?:c'est\s+)?(?:inconnue?|non\s+disponible|indisponible|non\s+connue?)
    |(?:il\s+n'y\s+a\s+)?pas\s+(?:assez|suffisamment)\s+d'informations?|informations?\s+insuffisantes?
    |aucune\s+information(?:\s+disponible)?
    |(?:es\s+)?(?:desconocid[oa]|no\s+disponible)|no\s+se\s+(?:sabe|conoce)|(?:información|datos)\s+insuficientes?
    |(?:no\s+hay\s+)?(?:suficiente\s+información|información\s+suficiente)|sin\s+(?:información|datos)
    |(?:è\s+)?(?:sconosciut[oa]|ignot[oa]|non\s+disponibile|non\s+not[oa])
    |(?:informazioni|dati)\s+insufficienti|non\s+ci\s+sono\s+(?:abbastanza|sufficienti)\s+informazioni
    |nessuna\s+informazione(?:\s+disponibile)?
    |未知|不详|不詳|不明|不清楚|无法得知|無法得知|无可用信息|(?:信息|資訊|资料|資料|数据)(?:不足|不够|不夠)
    |(?:没有|沒有)(?:足够|足夠|充分)?的?(?:信息|資訊|资料|資料|数据)
    |不明(?:です|である)?|(?:情報|データ)(?:が)?(?:不足(?:です|しています)?|足りません|足りない|ありません|なし)
    |十分な(?:情報|データ)が(?:ありません|ない)
    |(?:هو\s+|هي\s+)?غير\s+(?:معروف|معروفة|متوفر|متوفرة|متاح|معلوم)|مجهول|مجهولة
    |معلومات\s+غير\s+كافية|(?:لا\s+توجد|لا\s+تتوفر)\s+معلومات(?:\s+كافية)?
    |अज्ञात|ज्ञात\s+नहीं|उपलब्ध\s+नहीं|(?:पर्याप्त\s+|अपर्याप्त\s+|कोई\s+)?जानकारी(?:\s+उपलब्ध)?\s+नहीं|अपर्याप्त\s+जानकारी
    |ไม่ทราบ|ไม่รู้|ไม่ปรากฏ|ไม่ระบุ|ไม่มีข้อมูล(?:ที่)?(?:เพียงพอ)?|(?:มี)?ข้อมูลไม่(?:เพียง)?พอ""",
    re.VERBOSE | re.IGNORECASE,
)
"""Answers that state nothing, if the text is nothing else. "Cannot be determined" is an option of many tests."""
_EDGES: Final = " \t\n\"'*_`()[]-–—.,;:!?。、…“”„«»「」"
_COPULA: Final = re.compile(r"\s(?:है|हैं)\Z")

AS_AN_AI: Final = re.compile(
    r"""\b(?:as|i\s+am|i'm|being)\s+(?:just\s+|only\s+)?an?\s+(?:[\w-]+\s+){0,3}?
        (?:ai\b(?!\s+(?:company|developer|engineer|ethicist|expert|lab|professor|researcher|scientist|student|user))
        |artificial\s+intelligence|language\s+model|llm\b|chatbot|(?:digital|harmless|helpful|virtual)\s+assistant)
        [^.]{0,60}?(?:\bi\s+|\band\s+(?:i\s+)?|\bso\s+i\s+|\bi')
        (?:can\s?not|can't|am\s+unable|am\s+not\s+(?:able|allowed|permitted)|m\s+(?:unable|not\s+(?:able|allowed|permitted))
        |(?:do\s+not|don't)\s+have|have\s+no|lack|won't|will\s+not|must\s+decline|am\s+not\s+capable)\b
    |\bals\s+(?:[\w-]+\s+){0,2}?(?:ki\b|künstliche\s+intelligenz|[\w-]*sprachmodell|[\w-]*chatbot)
        [^.]{0,40}?\b(?:kann|darf|bin|werde|habe|verfüge)\s+ich\b.{0,200}?\b(?:nicht|kein\w*|außerstande|unfähig)
    |\b(?:en\s+tant\s+qu(?:'|e\s+)|étant\s+une?\s+)(?:\w+\s+){0,2}?(?:ia\b|intelligence\s+artificielle|modèle\s+de\s+lang|assistant)
        [^.]{0,60}?\bje\s+n(?:e\s+(?:peux|puis|suis|dispose|possède)|'ai)\b
    |\b(?:como|siendo|al\s+ser|soy)\s+(?:una?\s+)?(?:[\w]+\s+){0,2}?(?:ia\b|inteligencia\s+artificial|modelo\s+de\s+lenguaje|asistente)
        [^.]{0,60}?\bno\s+(?:puedo|estoy|soy\s+capaz|tengo|me\s+es\s+posible)\b
    |\b(?:come|in\s+quanto|essendo|sono)\s+(?:un(?:a\s+|'|\s+)?)?(?:[\w]+\s+){0,2}?
        (?:ia\b|ai\b|intelligenza\s+artificiale|modello\s+linguistico|modello\s+di\s+linguaggio|assistente)
        [^.]{0,60}?\bnon\s+(?:posso|sono\s+in\s+grado|ho|dispongo|mi\s+è\s+possibile)\b
    |(?:作为|作為|身为|身為|我(?:只)?是)(?:一)?(?:个|個|款|名|种|種)?[^。,]{0,8}?(?:ai|人工智能|人工智慧|语言模型|語言模型|聊天机器人)
        [^。]{0,20}?(?:无法|無法|不能|不可以|没有|沒有|不具备|不具備)
    |(?:ai|人工知能|言語モデル|チャットボット)[^。,、]{0,12}?(?:として|なので|ですので|であるため|のため|ですから|ですが)
        [^。]{0,80}?(?:できません|できない|出来ません|かねます|ありません|持っていません|持ちません)
    |(?:بصفتي|باعتباري|كوني|لكوني|أنا\s+مجرد|بما\s+أنني)\s[^.。]{0,12}?(?:ذكاء|نموذج|مساعد|روبوت|برنامج)
        [^.。]{0,40}?(?:لا\s+(?:أستطيع|يمكنني|أملك|أقدر)|لست\s+قادر|ليس\s+لدي|غير\s+قادر)
    |(?:एआई|\bai|कृत्रिम\s+बुद्धिमत्ता|भाषा\s+मॉडल)[^।。]{0,20}?(?:के\s+रूप\s+में|(?:होने\s+)?के\s+नाते)[^।。]{0,80}?(?:नहीं|असमर्थ)
    |ในฐานะ[^.]{0,12}?(?:ai|เอไอ|ปัญญาประดิษฐ์|โมเดลภาษา|แบบจำลองภาษา|ผู้ช่วย)[^.]{0,60}?(?:ไม่สามารถ|ไม่มี|ไม่ได้รับอนุญาต)
    """,
    re.VERBOSE | re.IGNORECASE,
)
"""A model that names itself as the reason why it cannot, whatever follows."""

_LANGUAGES: Final = (
    r"(?:English|German|French|Spanish|Italian|Chinese|Mandarin|Japanese|Arabic|Hindi|Thai|Latin|Russian|Portuguese)"
)
_MEANS: Final = re.compile(
    rf"""(?<!this\ )(?<!that\ )(?<!which\ )(?<!by\ no\ )\bmeans\b|\btranslat(?:es?|ed)\s+(?:to|as|into)\b
    |\btranslation\s+is\b|\bis\s+the\s+(?:[\w]+\s+)?translation\b|\bstands\s+for\b
    |\bin\s+{_LANGUAGES},?\s+(?:is|it's|you|we|one|they)\b|\bis\s+{_LANGUAGES}\s+for\b
    |\bbedeutet\b|\bheißt\s+(?:auf|übersetzt|so\s+viel)\b|\bübersetzt\s+(?:heißt|bedeutet|man|sich)\b
    |\bauf\s+(?:Deutsch|Englisch|Französisch|Spanisch|Italienisch|Chinesisch|Japanisch|Arabisch|Hindi|Thai)\s+(?:heißt|sagt|lautet)
    |\bsignifie\b|\bveut\s+dire\b|\bse\s+traduit\b|\bse\s+dit\b|\bon\s+dit\b
    |\bsignifica\b|\bquiere\s+decir\b|\bse\s+traduce\b|\bse\s+dice\b
    |\bvuol\s+dire\b|\bsi\s+traduce\b|\bsi\s+dice\b
    |意思是|(?:翻译|翻譯|译|譯)(?:成|为|為)|(?:英文|英语|中文|法语|德语|日语)(?:是|叫|里是)|という意味|[语語]で[^。]{{1,80}}(?:です|と言|という)
    |تعني|يعني|معناها|معناه|ترجمتها|ترجمة\s
    |(?:का\s+(?:अर्थ|मतलब)|अनुवाद)(?!\s+(?:नहीं|क्या|मुझे))
    |แปลว่า|หมายความว่า|หมายถึง|ภาษา(?:อังกฤษ|ไทย|เยอรมัน)(?:คือ|ว่า)""",
    re.VERBOSE | re.IGNORECASE,
)
_ASKS: Final = re.compile(
    r"\b(?:what|how|which|whether|was|wie|welche\w*|ob|ce\s+qu(?:e|'\w+)|que|comment|quel\w*|qué|cómo|cuál|cosa|come|che"
    r"|quale)\b|ماذا|كيف|\bما\b",
    re.IGNORECASE,
)
"""Words that begin an indirect question before it: "I don't know what it means"."""
_ASKS_IN_PLACE: Final = re.compile(
    r"什么|什麼|怎么|怎麼|如何|どう|どんな|何|か(?=わか|分か|知)|क्या|कैसे|อะไร|อย่างไร|ยังไง"
)
"""Those of languages in which they may follow."""
_QUOTES: Final = re.compile(
    r""""[^"\n]{1,300}"|“[^“”\n]{1,300}”|„[^„“”"\n]{1,300}[“”"]|«[^«»\n]{1,300}»|»[^«»\n]{1,300}«|‹[^‹›\n]{1,300}›
    |「[^「」\n]{1,300}」|『[^『』\n]{1,300}』|《[^《》\n]{1,300}》|`[^`\n]{1,300}`
    |(?<!\w)'(?=[^\s'])(?:[^'\n]|(?<=\w)'(?=\w)){1,300}'(?!\w)""",
    re.VERBOSE,
)
_QUOTED: Final = "X"
"""In place of a quotation, which is not the writer's own statement."""


def states_nothing(text: str) -> bool:
    """Whether a text is only "N/A", "unknown", "not enough information" or the like, or states that as its answer."""
    if len(text) > _MOST:
        return False
    return _is_whole(text) or ((stated := stated_answer(text)) is not None and _is_whole(stated))


def _is_whole(text: str) -> bool:
    return _WHOLE.fullmatch(_COPULA.sub("", text.strip(_EDGES))) is not None


def without_quotations(text: str) -> str:
    """A folded text without what it quotes, unless it is one quotation as a whole."""
    own = _QUOTES.sub(" ", text)
    if own == text or not re.search(r"\w", own):
        return text
    stated = stated_answer(f"{own}.")  # of `Answer: "I don't know"` only the full stop
    return text if stated is not None and not stated.strip(_EDGES) else _QUOTES.sub(_QUOTED, text)


def explains_words(clause: str) -> bool:
    """Whether a clause states what words mean or how they are translated, and does not ask it."""
    found = _MEANS.search(clause)
    return found is not None and not (_ASKS.search(clause, 0, found.end()) or _ASKS_IN_PLACE.search(clause))


def only_introduces(clause: str) -> bool:
    """Whether a clause is nothing but "Answer" or "The answer is", which a colon cut from the answer."""
    stated = stated_answer(f"{clause}:.") if len(clause) <= _MOST else None
    return stated is not None and not stated.strip(_EDGES)


def is_too_short(text: str) -> bool:
    """Whether a text has at most two letters: "no" in many languages, and no refusal."""
    return len(text.strip(_EDGES)) < _LEAST
