"""The phrases around the letter of an option: stated, confirmed, ruled out, joined; in ten languages.

Each pattern is matched on a window of at most `WINDOW` characters before or after the letter.
"""

from __future__ import annotations

import re
from typing import Final

WINDOW: Final = 80
"""Characters before or after a letter that are read."""


def _before(*alternatives: str) -> re.Pattern[str]:
    return re.compile(rf"(?:{'|'.join(alternatives)})\Z", re.IGNORECASE)


def _after(*alternatives: str) -> re.Pattern[str]:
    return re.compile(rf"\s*+(?:{'|'.join(alternatives)})", re.IGNORECASE)


_NOUN = (
    r"options?|choices?|letters?|answers?|opci[oó]n(?:es)?|opzion[ei]|Optionen|Antwort(?:en)?|réponses?"
    r"|lettre|letra|lettera"
)
_NOUN_OTHER = r"选项|選項|選択肢|الخيار|الإجابة|الحرف|विकल्प|ข้อ|ตัวเลือก"
_LINK = (
    r"(?:[\s:=(\[\"'\-–—,、>]|\b(?:is|was|would|should|must|has|be|to|therefore|thus|clearly|definitely"
    r"|indeed|then|most"
    r"|likely|probably|the|correct|right|best|ist|lautet|wäre|wohl|die|der|das|richtige|est|serait|donc|l'"
    r"|la|le|es|sería"
    rf"|è|sarebbe|il|un|correcta|correcte|corretta|giusta|{_NOUN})\b|est\b|{_NOUN_OTHER}|应该|应|该|是|为|為|选择|选|選"
    r"|は|هو|هي|الصحيحة|الصحيح|هو:|है|सही|ที่ถูกต้อง|ที่ถูก|คือ)*+"
)
_QUALITY = r"(?:correct|right|best|final|true|proper|appropriate|accurate)"
STATED: Final = _before(
    rf"(?<!\w)(?:answers?|{_QUALITY}\s+(?:option|choice|letter|one|answer|statement)|solution|conclusion)\b{_LINK}",
    r"\bmy\s+(?:final\s+)?(?:choice|pick|vote|guess|selection)\b" + _LINK,
    r"\b(?:I|we|let's|let\s+us)(?:'d|'ll|'m|\s+would|\s+will|\s+am|\s+have|\s+must"
    r"|\s+can\s+only)?(?:\s+\w+ly)?\s+(?:choose|chose"
    r"|chosen|pick|picked|picking|select|selected|say|said|go(?:ing)?\s+(?:with|for)|went\s+with|opt(?:ing)?\s+for"
    r"|vot(?:e|ing)\s+for|guess|prefer|answer|conclude)\b" + _LINK,
    r"\b(?:choose|pick|select|go\s+with)\b" + _LINK,
    r"\b(?:Antwort|Lösung|Ergebnis|(?:richtig|korrekt|best)e\s+(?:Option|Wahl)|ich\s+(?:wähle|nehme|würde)"
    r"|entscheide\s+mich\s+für|richtig\s+ist|korrekt\s+ist)\b" + _LINK,
    r"(?<!\w)(?:réponse|solution|(?:bonne|meilleure)\s+(?:option|lettre)|option\s+correcte"
    r"|je\s+(?:choisis|prends|dirais|retiens|sélectionne))\b" + _LINK,
    r"\b(?:respuesta|soluci[oó]n|opci[oó]n\s+(?:correcta|es)|alternativa\s+correcta|elijo|escojo"
    r"|elegir[ií]a|selecciono)\b" + _LINK,
    r"\b(?:risposta|soluzione|(?:opzione|scelta|alternativa)\s+(?:corretta|giusta|esatta)|scelgo"
    r"|sceglierei)\b" + _LINK,
    r"(?:答案|正确的?(?:答案|选项)?是|正确选项|正确答案|正確答案|我(?:会|的)?选择?|应该?选|故选|因此选|所以选|本题选|选择|选)"
    + _LINK,
    r"(?:答え|正解|解答|回答|正しい(?:もの|選択肢|答え|の))" + _LINK,
    r"(?:الجواب|الإجابة|الاجابة|الحل|الخيار\s+(?:الصحيح|الأصح)|أختار|اختار)" + _LINK,
    r"(?:उत्तर|जवाब|सही\s+विकल्प|मैं)" + _LINK,
    r"(?:คำตอบ|ตอบ|เลือก|ข้อที่ถูก(?:ต้อง)?)" + _LINK,
)
"""Ends right before a letter that the text states as its answer."""
SUGGESTED: Final = _before(
    r"\b(?:it(?:'s|\s+is|\s+must\s+be|\s+has\s+to\s+be|\s+should\s+be|\s+would\s+be)|this\s+is|that's"
    r"|must\s+be|es\s+ist"
    r"|c'est|ce\s+serait|leaves|leaving)\b(?:\s+(?:definitely|clearly|probably|likely"
    r"|obviously))?(?:[\s:(\"']|\b(?:only|option|choice)\b)*+",
)
"""As `STATED`, in weaker words: "it must be"."""
_SURE = (
    r"(?:(?:also|clearly|definitely|obviously|probably|most|likely|indeed|therefore|thus|the|a|an|only"
    r"|actually|both|all|simply)\s+)*+"
)
CONFIRMED: Final = _after(
    r"[)\].:]?\s*(?:is|are|was|seems|looks|appears|sounds|must\s+be|has\s+to\s+be|would\s+be|should\s+be"
    r"|is\s+thus)\s+(?:to\s+be\s+)?"
    rf"{_SURE}(?:my\s+)?(?:correct|right|true|best|answer|accurate|valid|(?:choice|pick|solution)\b)",
    r"it\s+is\b",
    r"it's\b",
    r"(?:fits|matches|works|holds|applies)\b(?!\s+(?:not|only\s+partially))",
    r"(?:ist|wäre|scheint|sind)\s+(?:\w+\s+){0,2}?(?:richtig|korrekt|wahr|zutreffend|Antwort|Lösung)"
    r"|stimmt\b(?!\s+nicht)|trifft\s+zu|passt\b(?!\s+nicht)",
    r"(?:est|sont|serait|semble)\s+(?:\w+\s+){0,2}?(?:correcte?|juste|vraie?|exacte?|bonne|réponse)",
    r"(?:es|son|sería|parece)\s+(?:\w+\s+){0,2}?(?:correct[ao]|verdader[ao]|ciert[ao]|respuesta)",
    r"(?:è|sono|sarebbe|sembra)\s+(?:\w+\s+){0,2}?(?:corrett[ao]|giust[ao]|ver[ao]|esatt[ao]|risposta)",
    r"(?:选项|项)?(?:才)?(?:是)?(?:正确|对的|正解|最佳|最合适|答案)|正確",
    r"(?:が|は|を)(?:正解|正しい|答え|選び|選択|最も適切|適切)|(?:です|だ|である)(?:[。.!]|\s*\Z)",
    r"(?:هو|هي|فهو|يعتبر)?\s*(?:الصحيح|صحيح|صحيحة|الإجابة|الجواب)",
    r"(?:ही\s+)?(?:सही|उत्तर)(?!\s*(?:उत्तर\s+)?नहीं)",
    r"(?:คือ|เป็น)?(?:คำตอบ|ถูก)",
)
"""Begins right after a letter that the text confirms."""
_NOT_WRONG = r"(?!\s+(?:only|just|wrong|incorrect|false))"
_WRONG = (
    r"(?:in-?correct|wrong|false|invalid|untrue|inaccurate|ruled\s+out|eliminated|excluded|impossible|implausible"
    r"|unlikely|irrelevant|unrelated|out\b|no\b)"
)
DENIED: Final = _after(
    r"[)\].:,]?\s*(?:is|are|was|were|seems?|looks?|appears?|sounds?|would\s+be|must\s+be|can\s+be"
    r"|could\s+be|should\s+be|has\s+been|have"
    rf"\s+been)\s+{_SURE}(?:to\s+be\s+)?(?:not\b{_NOT_WRONG}|{_WRONG})",
    r"[)\].:,]?\s*(?:would|should|could|must|do|does|did|can|may|might)\s+not\b",
    rf"[)\].:,]?\s*(?:(?:is|are|was|were)n't\b{_NOT_WRONG}|cannot\b|(?:ca|wo|would|could|should|does|do"
    rf"|did)n't\b|fails\b|contradicts\b|makes?\s+no\b|violates\b)",
    rf"[)\].:]?\s*[-–—:(=]+\s*(?:(?:this|that|it|which)(?:'s|\s+is)\s+)?(?:not\b|{_WRONG})",
    rf"[)\].:]\s*[^.\n;!?]{{1,50}}?(?:\s(?:is|are|-|–)|:)\s+(?:not\b{_NOT_WRONG}|{_WRONG})",
    r"(?:ist|sind|wäre|scheint)\s+(?:\w+\s+){0,2}?(?:nicht|falsch|inkorrekt|unrichtig|ausgeschlossen"
    r"|unmöglich|auszuschließen)"
    r"|scheide[tn]\b|kann\s+nicht|(?:passt|stimmt|trifft|gilt)\s+nicht|entfällt|fällt\s+weg",
    r"(?:est|sont|semble)\s+(?:\w+\s+){0,2}?(?:faux|fausses?|incorrecte?s?|erronée?s?|exclue?s?|à\s+exclure"
    r"|impossible)"
    r"|n'est\s+pas|ne\s+(?:sont|convient|peut|correspond|fonctionne)",
    r"(?:es|son|está|parece)\s+(?:\w+\s+)?(?:incorrect[ao]s?|fals[ao]s?|erróne[ao]s?|imposible"
    r"|descartad[ao])|no\s+(?:es|son|puede|parece)",
    r"(?:è|sono|sembra)\s+(?:\w+\s+)?(?:sbagliat[aoe]|errat[aoei]|fals[aoe]|scorrett[aoe]|incorrett[aoe]"
    r"|esclus[aoe])|non\b",
    r"(?:选项|项)?(?:是|也|都|就|明显|显然|则|很|并)*(?:错|不正确|不正確|不对|不對|不是|不符|不成立|不可能|被?排除|不能|有误|不合)",
    r"(?:は|が|も|で)*(?:誤|間違|不正解|正しく(?:ない|あり)|正解では(?:ない|あり)|違い|違う|不適切|ない|ありません|なく|除外)",
    r"(?:هو|هي|فهو|فهي)?\s*(?:خاطئ|خطأ|غير\s|ليس|مستبعد|لا\s)",
    r"(?:भी\s+|बिल्कुल\s+|तो\s+)*(?:ग़लत|गलत|सही\s+(?:उत्तर\s+)?नहीं|नहीं|असत्य|अनुपयुक्त)",
    r"(?:นั้น|ก็|เป็นคำตอบที่|เป็น)*(?:ผิด|ไม่)",
)
"""Begins right after a letter that the text rules out."""
RULED_OUT: Final = _before(
    r"(?:\bnot|n't(?:\s+be)?|\bnever|\bneither|\bnor|\brather\s+than|\binstead\s+of|\bexcept(?:\s+for)?"
    r"|\bexcluding|\bover|\bunlike"
    r"|\brul(?:e[sd]?|ing)\s+out|\beliminat(?:e|es|ed|ing)|\bexclud(?:e|es|ed)|\bdiscard(?:s|ed|ing)?"
    r"|\breject(?:s|ed|ing)?"
    r"|\bdismiss(?:es|ed)?|\b(?:wrong|incorrect|false)(?:\s+(?:answer|option|choice|one))?\s+(?:is|was)"
    r"|\bnicht|\bstatt|\banstatt|\bweder|\bnoch|\baußer|\bpas|\bplutôt\s+qu[e']|\bau\s+lieu\s+de|\bni"
    r"|\bsauf|\bno\s+es|\bno(?:\s+la)?"
    r"|\ben\s+lugar\s+de|\ben\s+vez\s+de|\bexcepto|\bdescart\w{1,5}|\bnon(?:\s+è)?|\binvece\s+di"
    r"|\bpiuttosto\s+che|\bné|\btranne|\bescl\w{1,6}"
    r"|不是|不选|不選|而非|并非|排除|除了|ليس(?:ت)?|بدلا\s+من|استبعد|न\s+कि|ไม่ใช่|ไม่เลือก|แทนที่จะเป็น)"
    rf"(?:[\s(\[\"']|\b(?:the|only\s+one|{_NOUN}|la|le|l'|die|der|el|un)\b|{_NOUN_OTHER})*+"
)
"""Ends right before a letter that the text rules out."""
DOUBTED: Final = re.compile(
    r"(?:\b(?:don't|do\s+not|doesn't|didn't|cannot|can't|never)\s+(?:think|believe|see|choose|pick|select"
    r"|go|say)|\bdoubt"
    r"|\bglaube\s+nicht|\bne\s+pense\s+pas|\bno\s+creo|\bnon\s+credo)\b[^.!?;\n,]*\Z",
    re.IGNORECASE,
)
"""Begins a clause that states what the writer does not believe."""
JOIN: Final = re.compile(
    r"[)\]\s]*(?:(?P<comma>,|、|;)|(?P<slash>/|&)|(?P<conjunction>(?:,\s*)?(?:\b(?:and|or|nor|und|oder|noch"
    r"|et|ou|ni|y|o|e|né)\b|和|或|及|与|跟|と|や|か"
    rf"|أو|و|और|या|และ|หรือ)))\s*(?:\b(?:the|{_NOUN})\b|{_NOUN_OTHER})?[\s(\[]*",
    re.IGNORECASE,
)
"""Between two letters that are named together."""
SEVERAL: Final = re.compile(r"\s*[)\].]?\s*(?:are|were|both|all|sind|sont|son|sono|都|はいずれ|दोनों|ทั้ง)", re.IGNORECASE)
"""Begins what is true of all letters named together."""
MARKED: Final = _before(rf"(?:\b(?:{_NOUN})\b|{_NOUN_OTHER})[\s:]*+")
"""Ends right before a letter that is called an option."""
FOLLOWS: Final = re.compile(
    r"""(?:is|isn't|was|wasn't|are|because|since|as|it|it's|seems|must|would|should|could|will|can|cannot"
    r"|can't|has|does|doesn't|or
    |and|but|so|for|by|given|due|then|not|which|over|from|in|on|with|without|here|too|instead|rather|than|if|when|while|also|alone
    |obviously|clearly|definitely|certainly|may|might|to|be|being|versus|vs|only|where|who|that
    |[a-z]{2,12}(?<![sui])s(?<!bus)
    |ist|sind|schon|weil|da|denn|passt|stimmt|scheint|wäre|und|oder|nicht|trifft
    |est|car\s+(?:il|elle|c'|la|le|les|cette|ce)|parce|puisque|semble|et|ou|convient|n'est|ne|serait
    |es|porque|ya|pues|parece|sería|o|y|no|è|perché|poiché|sembra|sarebbe|non|e)(?![\w'])""",
    re.VERBOSE,
)
"""A word that may follow the letter A as a name; other words follow the English article."""
FOLLOWS_I: Final = re.compile(
    r"""(?:is|isn't|because|since|as\s+(?:it|the|this|[A-Z])|it\s+(?:is|must)|it's|seems|looks|appears|fits|matches|works|holds|makes"
    r"|gives|does|doesn't
    |here|instead|rather\s+than|over|not|(?:or|and)\s+\(?[A-Z]|and\s+not|for\s+sure|(?:can|must|obviously|clearly|definitely)\s*(?=[.,;!]|\Z)|schon|would\s+be\s+my\s+(?:choice|answer|pick)
    |ist|weil|est|car|es|porque|è|perché|stimmt|passt)(?![\w'])""",
    re.VERBOSE,
)
"""A word that may follow the letter I as a name, and not the English pronoun."""
