"""The words and patterns by which `count_parser` reads an answer, in the order in which it uses them.

All patterns are for text in lower case without markup (`count_parser.make_even`). Each looks a bounded distance, so
that reading takes linear time. tests/tasks/count_answers.jsonl holds answers for every one of them.
"""

import re

from finetuning.tasks.numerals import numeral_pattern

# --- People ---------------------------------------------------------------------------------------------------------
# Anybody: "no people" is nobody, "no children" is not.
ANYBODY = (
    r"people|peoples|ppl|persons?|individuals?|pedestrians?|humans?|human\sbeings?|visitors?|customers?|shoppers?"
    r"|passengers?|folks?|souls?|pax|passers-by|passersby|bystanders?"
)
SOMEBODY = (
    r"peeps|figures?|heads?|faces?|subjects?|men|man|women|woman|adults?|children|child|kids?|boys?"
    r"|girls?|guys?|gals?"
    r"|dudes?|chaps?|fellows?|lads?|ladies|lady|gentlemen|gentleman|players?|onlookers?|spectators?"
    r"|commuters?|travell?ers?"
    r"|tourists?|students?|pupils?|workers?|employees?|staff|guests?|attendees?|participants?|members?|fans|diners?"
    r"|patrons?|clients?|buyers?|walkers?|joggers?|runners?|cyclists?|riders?|drivers?|skaters?|skiers?"
    r"|swimmers?|dancers?"
    r"|singers?|musicians?|soldiers?|officers?|policem[ae]n|guards?|teachers?|nurses?|doctors?|patients?|toddlers?"
    r"|bab(?:y|ies)|infants?|teens?|teenagers?|youths?|youngsters?|seniors?|elders?|friends|relatives|citizens?"
    r"|residents?|strangers?|athletes?|protest[eo]rs?|marchers?|hikers?|vendors?|clerks?|cashiers?|waiters?"
    r"|males?|females?|mall-?goers?|concert-?goers?|party-?goers?|strollers\sby|crew"
)
PEOPLE = rf"(?:{ANYBODY}|{SOMEBODY})(?:\(s\)|/s)?(?![\w-])"
GENERAL = rf"(?:{ANYBODY})(?:\(s\)|/s)?(?![\w-])"
# 명 also begins ordinary words: 이 명단 is "this list", not "two people".
FORMAL_COUNTER = (
    r"(?:명(?!째|꼴|단|백|확|령|동|소|칭|함|암|절|작|품|씩\s?앉을)|名|人|"
    r"인(?=\s*(?:이|은|의|을|도|과|입니다|정도|쯤|가량|으로|이상|이하|미만|[.,!?)}\]+~/–-]|$))(?!이상하))"
)
COUNTER = rf"(?:사람|{FORMAL_COUNTER})"
HONORIFIC = r"분(?!\s*(?:전|후|동안|뒤|간|경|까지|[,.]?\s?\d+초)|[짜량류석위])"
KOREAN_PEOPLE = (
    r"(?:남자|여자|남성|여성|아이|어린이|학생|어른|성인|보행자|행인|손님|승객|관객|소년|소녀|노인|직원|인물)"
)
# "35 visible heads", "35 mall visitors": up to two words that end no phrase and measure nothing.
FUNCTION_WORDS = (
    "of|in|on|at|by|to|for|from|with|and|or|but|nor|is|are|was|were|be|has|have|near|that|which|who|whom|as|than|per|the"
    "|while|where|so|can|could|may|not|behind|around|inside|outside|out|making|makes|gives|equals|all|here|there"
)
NO_ADJECTIVE = (
    f"{FUNCTION_WORDS}|minutes?|seconds?|hours?|days?|weeks?|months?|years?|percent|groups?|rows?|lines?|pairs?|couples?|teams?|times"
    "|cars?|floors?|more|fewer|less|additional|extra|each|empty|no|plus|odd|something|some"
    "|if|frames?|images?|views?|k|x"
)
DESCRIBED = rf"(?:(?!(?:{NO_ADJECTIVE})\b|[a-z'-]{{1,24}}[^su\W]s\s)[a-z'][a-z'-]{{0,24}}\s){{0,2}}"
COUNTED = rf"(?:(?:\s|(?<=\d)){DESCRIBED}{PEOPLE}|\s?{COUNTER})"
AFTER_PEOPLE = re.compile(rf"^{PEOPLE}|^\s?\)?(?:\s?(?:or\sso|total|in\stotal|\(est\.?\)))?{COUNTED}")
AFTER_HONORIFIC = re.compile(rf"^\s?{HONORIFIC}")
DIGITS_HONORIFIC = re.compile(
    r"^\s?분[이은께의]?(?:서|께서)?\s?(?:계[시십세신셨]|보[이입여]|오[시셨]|모[이여]|서\s?[계있]|앉)"
)
APPROXIMATELY = (
    r"(?:about|around|approximately|approx|roughly|exactly|precisely|only|just|circa|some|maybe|perhaps"
    r"|probably|likely"
    r"|an?\sestimated|estimated|currently|actually|~|≈|=|약|대략|대략적으로|정확히|단|딱|오직|한|얼추|어림잡아|대충|아마도?)"
)
LABELS = (
    r"(?:(?:total|final|overall|my|the|estimated|predicted|visible|actual|current|approximate|correct|full)\s)*"
    r"(?:(?:people|persons?|head|heads|human|crowd|pedestrian|visitor|customer|shopper|individuals?|passenger)\s?"
    r"(?:count|counts|counted|number|total|size|present|visible|detected|seen|in\sview|in\sthe\s\w+)?"
    r"|(?:number|num|no|nr|n|count|total|amount|quantity|tally|sum|nb)\s(?:of\s)?(?:the\s)?(?:\w+\s)?(?:people"
    r"|persons?"
    r"|individuals|pedestrians|humans|heads|visitors|customers|shoppers|passengers)(?:\s\w+){0,6}?"
    r"|count|headcount|answer|estimate|estimation|guess|result|prediction|reply|response|output|tally"
    r"|occupancy|value"
    r"|crowd)"
)
KOREAN_LABELS = (
    r"(?:사람|인원|총인원|인구|보행자|행인|손님|승객|방문객|관람객|정답|답|답변|결과|계수|카운트|숫자|예상|추정|인원수|머릿수"
    r"|전체|현재|검출된|탐지된|감지된|보이는|집계|측정|최종)(?:들)?(?:의)?\s?(?:수|숫자|인원|결과|값|개수|인원수)?(?:은|는|이|가)?"
)
BEFORE_PEOPLE = re.compile(
    rf"(?:(?:^|[^a-z-])(?:{LABELS})\s?(?:is|are|was|were|being|comes?\sto|stands?\sat|equals|as|[:=]"
    rf"|:\s?=|->|→|⇒|-)\s?"
    rf"|(?:^|[\s(,:]){KOREAN_LABELS}\s?[:=]?\s?"
    rf"|\b(?:crowd|group|gathering)(?:\s(?:size|numbers|consists|is\smade\sup))?\s(?:of|is|numbers)\s"
    rf")(?:(?:총|모두|전부|도합|{APPROXIMATELY})\s?)*$"
)
# "Several people (14)": the number says again what stands before the bracket.
IN_BRACKETS = re.compile(rf"(?:^|[^a-z-]){PEOPLE}\s?\(\s?$")
# What may end a phrase after a number that a label binds.
PHRASE_END = re.compile(
    r"^\s?(?:$|[.,;!)\]}|+=–-]|입니다|입니당|이다|이에요|예요|이네|이고|이며|이요|으로|로\s|정도|쯤|가량|여기|개?명|\s?있[습어]|\s?보[입여]|in\b|on\b|at\b"
    r"|and\b|with\b|or\sso\b|total\b|but\b|visible\b|\()"
)

# --- Numbers that count no people ------------------------------------------------------------------------------------
NUMBERED = (
    r"frame|image|photo|picture|camera|cam|scene|floor|zone|area|room|gate|level|hall|platform|terminal"
    r"|section|lane|track"
    r"|exit|entrance|row|line|aisle|channel|ch|page|figure|fig|table|step|option|question|clip|video"
    r"|shot|sector|region"
    r"|street|route|bus|flight|unit|store|shop|door|block|building|id|version|case|example|sample"
    r"|location|spot|seat"
    r"|number|no\.|#|cctv|stage|station|escalator|checkpoint|view|feed|stream|index|timestamp"
    r"|pier|jersey|프레임|카메라|사진|이미지|영상|구역|출구|게이트|번호|채널|화면|장면|방|호실"
)
MONTHS = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?"
    r"|nov(?:ember)?|dec(?:ember)?)\b\.?"
)
NO_COUNTS = [
    # Who is not told, while the count is: "Sorry, I can't identify people, but ..."
    r"(?:(?:i'm\s)?sorry,?\s(?:but\s)?|while\s|although\s|though\s)?\bi\s?(?:can't|cannot|can not|won't|'m unable to|am unable to|'m not able to)\s"
    r"(?:identify|recogni[sz]e|name)\b[^.;\d]{0,60}?(?:,\s?(?:but|however|though|yet)?|\sbut)\s",
    # What is no person, and is left out: "16 people, excluding the mannequins".
    r",?\s?\(?\b(?:excluding|not\scounting|not\sincluding|without|except(?:\sfor)?|apart\sfrom|ignoring)\s(?:(?:the|any|all)\s)?(?:\S{1,9}\s)?"
    r"(?:mannequins?|statues?|dolls?|dumm(?:y|ies)|reflections?|posters?|shadows?|cut-?outs?|billboards?|robots?)\b\)?,?",
    r"(?:마네킹|동상|인형|포스터|그림자|거울에\s?비친\s?\S+)\s?(?:\S{1,4}\s?(?:개|명))?[을를은는]?\s?(?:제외하[고면]|빼[고면]|뺀)",
    # Another frame than the one that is asked for.
    rf"\b\d+(?:\s{PEOPLE})?\s(?:in|at)\s(?:the|a)\s(?:previous|last|prior|earlier|preceding)\s(?:frame|image|photo|picture|shot|one|scene)\b"
    r"|\b(?:in|at)\s(?:the|a)\s(?:previous|last|prior|earlier|preceding)\s(?:frame|image|photo|picture|shot|one|scene),?\s(?:there\s)?(?:were|was|i\s(?:saw|counted))\s\d+"
    rf"(?:\s{PEOPLE})?|(?:이전|앞선|직전|지난)\s?(?:프레임|사진|화면|영상|장면)\S{{0,3}}\s?(?:\S{{1,4}}\s)?\d+\s?명(?:이었|이던|인데)?[가-힣]{{0,4}}",
    rf"\b(?:previous|last|prior|earlier|preceding)\s(?:frame|image|photo|picture|shot|one|scene)\s?\(\s?\d+(?:\s{PEOPLE})?\s?\)"
    rf"|,?\s?\b(?:up|down)\sfrom\s\d+(?:\s{PEOPLE})?",
    # "계단에는 아무도 없고 로비에 14명", "Two rows of seven: 14 people": what is counted comes after.
    r"\S{1,10}에[는도]?\s아무도\s?없(?:고|지만|으나|는데|으며)(?=[^.]{0,60}(?:명|사람|분))",
    rf"\b\S+\s(?:rows|pairs|groups|lines|columns|tables|teams)\sof\s\S+?(?:\s?[:=]|,?\s(?:so|hence|making|that's|which\smakes))\s(?=\S+\s{PEOPLE})",
    # Another place is empty: "17 people; the far corridor is empty".
    r"\b(?:rest\sof\sthe|other|far|left|right|upper|lower|back|opposite|second|next|adjacent|remaining)\s(?:\w+\s)?(?:scene|room|hall|mall|street|frame"
    r"|image|corridor|hallway|area|lobby|platform|plaza|square|station|place|store|shop|side|floor)\s(?:is|was|appears|looks|seems)(?:\sto\sbe)?"
    r"(?:\scompletely|\sentirely|\stotally)?\s(?:empty|deserted|vacant)\b",
    # "그 외에는 아무도 없습니다": what was counted is all.
    r"(?<=명)\s?(?:외에?는?|말고는?|밖에)\s?(?:다른\s?사람은?\s?)?(?:아무도\s?)?(?:없|보이지\s?않|안\s?보)[가-힣]*",
    r"(?:그\s?외에?는?|그\s?밖에?는?|이\s?외에?는?|다른|더)\s?(?:사람들?[은이도]?\s?)?(?:더\s?)?(?:아무도\s?)?(?:더\s?)?(?:없[가-힣]*|보이지\s?않[가-힣]*|안\s?보[가-힣]*)",
    # Files.
    rf"(?:\b(?:{NUMBERED}|seq|img|file)\s?)?[\w-]{{1,60}}\.(?:jpe?g|png|bmp|gif|webp|tiff?|mp4|avi|mkv)\b",
    # Changes and densities, and what is emphasised.
    rf"\b\d+(?:\s{PEOPLE})?\s(?:more|fewer|less)\sthan\s(?:before|earlier|yesterday|last|in\sthe|the|an?\s(?:minute|moment|second|hour|while))\b[^.,;:]{{0,30}}"
    r"|(?:이전|아까|어제|지난|직전|전)\S{0,6}보다\s?\d+\s?명\s?(?:이\s)?(?:늘|줄|많|적|증가|감소)\S{0,3}",
    r"\d+(?:\.\d+)?\s(?:people|persons)\s?(?:per|/)\s?(?:m2|sqm|square|km)\S{0,10}|\bno more,?(?: and)? no less\b",
    r"\b(?:7|seven)-eleven\b|\S{1,4}\s?(?:명|사람)\s?중에?\s?\S{1,4}\s?(?:명|사람)\s?꼴|\d+\s?명째",
    # Counting aloud.
    r"(?<!\d)1, ?2(?:, ?(?:and )?\d+){1,200}(?:\.{2,3})?",
    r"\bone, two, three(?:, (?:and )?(?:four|five|six|seven|eight|nine|ten|eleven|twelve)){0,9}(?=\s?(?:[.:!…]|$))"
    r"|하나,?\s?둘,?\s?셋(?:,?\s?(?:넷|다섯|여섯|일곱|여덟|아홉|열)){0,7}(?=\s?[.:!…]\s)",
    # Dates and clock times.
    rf"\b(?:reads?|says?|dated)\s(?:19|20)\d\d\b(?!\s?{COUNTED})",
    r"\b(?:19|20)\d\d\s(?:photo(?:graph)?|picture|image|frame|video|footage|shot)\b",
    r"\b\d{2,4}[-/.]\d{1,2}[-/.]\d{1,4}(?:[t\s]\d{1,2}:\d{2}(?::\d{2})?(?:\.\d+)?z?)?\b",
    r"(?:\d{4}|이천\s?[가-힣]{1,6})\s?년(?:\s?\d{1,2}\s?월)?(?:\s?\d{1,2}\s?일)?|\d{1,2}\s?월(?:\s?\d{1,2}\s?일)?"
    r"|\d{1,2}\s?일(?!\S)",
    rf"\b{MONTHS}\s\d{{1,2}}(?:st|nd|rd|th)?\b(?:,?\s(?:19|20)\d\d)?(?!\s?{COUNTED})"
    rf"|\b\d{{1,2}}(?:st|nd|rd|th)?\s(?:of\s)?{MONTHS}(?:,?\s(?:19|20)\d\d)?\b",
    r"\b\d{1,2}\s?(?:to|-|–|and)\s?\d{1,2}\s?[ap]\.?m\b|(?:오전|오후|새벽|아침|저녁|밤|낮|정오)?\s?\d{1,2}\s?시(?:\s?\d{1,2}\s?분)?(?:\s?\d{1,2}\s?초)?(?:\s?(?:경|쯤|정각|반))?",
    r"\b\d{1,2}:\d{2}(?::\d{2})?(?:[.,]\d+)?(?:\s?[ap]\.?m\b\.?)?|\b\d{1,2}\s?[ap]\.?m\b\.?|\b\d{1,2}\s?o'clock\b"
    r"|\b\d{1,2}h\d{2}\b",
    rf"\b(?:in|since|year|during|of|by|from)\s(?:19|20)\d\d\b(?!\s?{COUNTED})",
    r"\d+\s?(?:초|분\s?(?:전|후|동안|뒤|간))",
    # Shares, money, ages.
    r"(?:\d+|[삼사오])\s?분의\s?(?:\d+|[일이삼사])",
    r"\d+(?:[.,]\d+)*\s?(?:%|percent\b|per\scent\b|퍼센트|프로\b)|[$€£₩¥]\s?\d+(?:[.,]\d+)*",
    r"\b(?:\d+|[a-z]+(?:-[a-z]+)?)(?:\s?(?:to|or|-)\s?\d+)?[\s-]years?[\s-]olds?\b|\baged?\s\d+(?:\s?(?:-"
    r"|to|and)\s?\d+)?"
    r"|\bages?\s\d+(?:\s?(?:-|to|and)\s?\d+)?",
    r"\d+(?:\s?[~-]\s?\d+)?\s?대(?:\s?(?:초반|중반|후반|안팎))?(?:의|로)?(?![가-힣])|\d+(?:\s?[~-]\s?\d+)?\s?(?:살"
    r"|세(?!\s?명|\s?사람))(?:짜리)?",
    r"\b(?:mid|early|late|low|high)?[\s-]?\d{1,2}0s\b",
    # Ordinals, numbers of things, versions.
    r"\b\d+(?:st|nd|rd|th)\b|제\s?\d+|\d+\s?(?:번째|째|번|호|층|위|차|등|회|학년|교시|구역|페이지|동(?=\s))",
    rf"\b(?<![a-z])(?:{NUMBERED})(?:s)?\s?(?:#|no\.?|number|id|:\s?#)?\s?[a-z]?-?\d+(?:[-.:]\d+)*(?:\s?(?:/"
    rf"|of)\s?\d+(?!\d|\s?{COUNTED}))?(?!\d|[.,]\d|\s?{COUNTED}|\s?분)",
    r"(?<!in )(?<!on )\b(?:frame|camera|cam|id|timestamp|index|channel|version|zone|floor|level|step)"
    rf"(?:\s(?:id|number|no|index))?\s?[:=]\s?\d+(?!\d|\s?{COUNTED})",
    r"\b(?:capacity|limit)\s?[:=]\s?\d+(?:\s(?:people|persons))?|\bspeed\slimit\s(?:is\s|of\s)?\d+",
    rf"#\s?\d+(?!\d|\s?{COUNTED})|\b[a-z]+-\d+\b",
    r"\b(?:person|people|man|woman|individual|human|figure|track|subject|사람|남자|여자|인물)\s?#?\d+(?=\s?[:).=–-](?!\d))",
    r"\b(?:fps|iso|score|confidence|conf|probability|certainty|threshold|iou|temperature|신뢰도|확률)\s?(?:of"
    r"|is|above|over|below|under|[:=<>≥≤])?\s?\d+(?:\.\d+)?(?:\s?/\s?\d+)?",
    r"\(\s?\d+(?:\.\d+)?\s?,\s?\d+(?:\.\d+)?\s?\)|\[(?:\s?-?\d+(?:\.\d+)?\s?,){1,40}\s?-?\d+(?:\.\d+)?\s?\]",
    r"\b\d+\s?x\s?\d+\b(?!\s?=)",
    r"\b(?:a|an|one) [a-z]+ or two\b|\b(?:boy|girl|man|woman|child|lady|guy) of (?:about )?\d+\b",
    # Room for people, and "one" as a pronoun.
    r"\b(?:tables?|seats?|seating|rooms?|space|capacity|bench(?:es)?|tickets?|places?|benches|enough)\s(?:for"
    r"|of|is)\s"
    r"(?:up\sto\s|about\s)?(?:\d+|[a-z]+)(?:\s(?:people|persons?))?",
    r"\bseats\s\d+(?:\speople)?|\d+\s?인\s?(?:용|승|석|분|실|조)|(?:정원|수용\s?인원)\S{0,3}\s?:?\s?\d+\s?명?",
    r"\bone\s(?:can|could|may|might|would|should|sees|must)\b|\b(?:each|every|this|that|the|another"
    r"|any|some)\sone\b(?!\s(?:person|man|woman))"
    r"|\bone\s(?:by\sone|another|side|day|end|corner|direction|moment|place|area|way|hand|thing)\b"
    r"|\bat\sone\b|\bas\sone\b",
    # 하나하나, 한쪽, 한 줄, 둘 다.
    r"하나하나|하나의|한\s?(?:쪽|편|줄|곳|장면|눈|번|때|구석|가운데|켠|장|컷)|둘\s?다|네\s?(?:,|\.)",
]
NO_COUNT = re.compile("|".join(f"(?:{pattern})" for pattern in NO_COUNTS))
LIST_MARK = re.compile(r"(?m)^(?:[-*•]\s?)?\(?\d{1,2}[.)]\s(?=\S)")

# --- Sentences that state nothing, and nobody -------------------------------------------------------------------------
# Before the number: "I cannot tell whether there are 7 people". A question mark anywhere.
DOUBT = re.compile(
    r"cannot|can't|can not|couldn't|could not|unable|sorry|not sure|unsure|uncertain|(?:don't|do not) know"
    r"|impossible"
    r"|not possible|hard to|difficult to|unclear|not clear|no way to|no idea|whether|\bif there\b|if we\b|suppose"
    r"|imagine|used to be|there (?:would|should|could|might) (?:be|have)|\bexpect"
    r"|수\s?가?\s?없|모르|모릅|모르겠|어렵|어려|불가|죄송|확실하지|확실치|불확실|불분명|만약|만일|라면"
)
DOUBT_AFTER = re.compile(
    r"not sure|unsure|uncertain|(?:don't|do not) know|(?:can't|cannot|can not|couldn't) (?:be|say"
    r"|tell|confirm|verify"
    r"|guarantee|count|determine)|(?:might|may|could) be (?:wrong|off|more|fewer|less|higher|lower)"
    r"|is wrong|incorrect"
    r"|not (?:right|true|correct)|if (?:you|we|i) (?:count|include)"
    r"|수\s?가?\s?없|모르|모릅|불가|죄송|확실하지|확실치|불확실|불분명|아닙니다|아니다|아니에요|아니예요|아닌|틀[렸린]|어렵|라면|더\s(?:많|적)을\s수"
)
# A syllable that ends in ㄴ or ㄹ ends an adnominal form: 앉아 있는, 모자를 쓴.
MODIFIER = f"[{''.join(chr(code) for code in range(0xAC00, 0xD7A4) if (code - 0xAC00) % 28 in (4, 8))}]"
NOBODY = re.compile(
    (
        rf"(?:\b(?:there(?:\s(?:is|are|were|was)|'s|'re)|i see|i can see|shows?|contains?|has|have"
        rf"|with|see|count|detected|found)\s"
        rf"(?:absolutely\s)?(?:no|zero|not any|not a single|no visible|not one)\s(?:visible\s|other\s)?{GENERAL}|"
        rf"(?:\b(?:no|zero|without any|not a single)|(?:n't|\bnot)(?: see| detect| find| spot| show| contain| have| include| depict)? (?:any"
        rf"|a single))\s(?:visible\s)?{GENERAL})"
        r"(?!\s(?:(?:is|are|was|were|who|that|with|wearing|on the (?:left|right))\b(?!\s(?:visible"
        r"|here|there|seen|present|in|at all|shown|detected|found))"
        r"|(?!is\b|are\b|was\b|were\b|in\b|on\b|at\b|here|visible|present|can be|to be|detected|found"
        r"|seen|shown|within|inside|around|appear|anywhere|whatsoever|i\b)[a-z]+))"
        r"|\b(?:there is|there's|there was|see|sees) (?:no one|nobody|no-one|not a soul|noone)\b(?!\s(?:on the"
        r"|wearing|sitting|standing|with|else|who))"
        r"|(?:n't|\bnot) (?:see |detect |find |spot )?(?:anyone|anybody)\b(?!\s(?:on the|wearing|sitting"
        r"|standing|with|else|who))"
        # "No one is looking at the camera" is not a count.
        r"|\b(?:no one|nobody|no-one)(?: (?:is|was|can be))?(?: (?:visible|here|there|seen|present"
        r"|in|at all|around)\b|\s?(?:[.!,]|$))"
        r"|\b(?:scene|room|hall|mall|street|frame|image|picture|photo|corridor|hallway|area|lobby"
        r"|platform|plaza|square|station"
        r"|place|store|shop) (?:is|was|appears|looks|seems)(?: to be)?(?: completely| entirely| totally)? (?:empty"
        r"|deserted|vacant)\b"
        r"|아무도\s?(?:없|안\s?보|보이지|안\s?계|찍히지)|(?:한|단\s?한)\s?(?:명|사람|분)도\s?(?:없|안\s?보|보이지|안\s?계)"
        r"|(?:텅|완전히)\s?비어\s?있|텅\s?[빈비]"
        # Nor is 앉아 있는 사람이 없습니다, "nobody is sitting".
        r"|(?:(?<!MODIFIER\s)|(?<=[에서]는\s)|(?<=보이는\s)|(?<=찍힌\s)|(?<=현재는\s)|(?<=지금은\s))(?<!쪽에는\s)(?<!쪽에\s)(?<!뒤에는\s)(?<!앞에는\s)(?<!측에는\s)(?<!옆에는\s)"
        r"(?:사람|인원|보행자|인물|행인|손님|승객)들?(?:의\s?(?:모습|흔적|형체))?[이가은는도]?\s?(?:전혀\s?|아무도\s?|하나도\s?)?"
        r"(?:없(?!지는?\s?않)|안\s?보이|보이지\s?않|존재하지\s?않|보이질\s?않)"
        r"|^\s?(?:(?:visible |total )?(?:people|persons|individuals|count|answer|total|number of people)(?: count| visible| in view)?\s?[:=]|(?:사람|인원수?)\s?:)"
        r"\s?(?:none|nil|nobody|no one|no people|없음|없습니다)\s?[.!]?\s?$"
        r"|^\s?(?:none|nil|empty|zilch|없습니다|없음|없어요|없다|없네요)\s?[.!]?\s?$"
    ).replace("MODIFIER", MODIFIER)
)
# What was said before is taken back.
CORRECTION = re.compile(
    r"\b(?:no,? wait|wait,? no|wait,? actually|wait,|oh wait|wait\.\.+|actually,"
    r"|scratch that|i mean,?|make that|make it|correction:?|let me (?:recount|re-count|count again"
    r"|correct)|recounting|on second thought"
    r"|sorry,(?=\s(?:\d|i|there|it|that|make))|or rather,?|strike that|my mistake)"
    # "14 figures, of which 2 are reflections; the actual number of people is 12", "20 figures, 4 of them dolls, leaving 16".
    r"|\b(?=(?:the\s)?(?:actual|real|true|correct)\s(?:total\s)?(?:count|total|answer|head\s?count|number(?:\sof\s(?:people|persons|individuals))?)\s(?:is|=|:|should))"
    r"|(?<=\d)[^.;]{0,60}?(?:,\s|\bwhich\s|\bthat\s|\bso\s)leav(?:es|ing)\s(?:us\swith\s)?(?=\S{1,20}\s(?:actual\s|real\s)?(?:people|persons|individuals)\b)"
    r"|\b(?:but|so|and)\s(?:there\s(?:are|is)\s)?(?:actually|really|in\sfact|in\sreality)\s(?:there\s(?:are|is)\s)?(?:only\s)?(?=\d+\s?(?:people|persons|individuals)\b)"
    # "12 figures, but one is a statue, so 11 people".
    r"|,?\s(?:but|though)\s(?:\d+|[a-z]{3,6})\s(?:of\s(?:them|those|these)\s)?(?:is|are)\s(?:an?\s|the\s|just\s)?"
    r"(?:statue|mannequin|reflection|poster|doll|cut-?out|shadow|robot)s?,?\s(?:so|making|leaving)\b(?=\s\S)"
    r"|^\s?actually\s(?=[a-z\d-]{1,20}\s(?:people|persons|individuals)\s?[.!]?\s?$)"
    r"|(?:실제로는?|사실은|정확히는|정확한\s?(?:인원\s?)?(?:수|숫자|인원)[는은]|실제\s?(?:인원|사람)\S{0,2})\s(?=(?:약\s|총\s|모두\s)?(?:\d+|[가-힣]{1,5})\s?(?:명|사람|분)\S)"
    # "16; on a second pass I get 18": what follows is one number and no more.
    r"|\b(?:on|after|upon)\s(?:(?:a|my|the)\s)?(?:second|closer|another|further|more\scareful|careful)\s"
    r"(?:pass|look|count|inspection|examination|review|check),?\s"
    r"(?=(?:i\s(?:now\s)?(?:get|count|find|see|have)|there\sare|it's|it\sis)\s[a-z\d-]{1,20}(?:\s(?:people|persons|individuals))?\s?[.!]?\s?$)"
    # "18 at first glance, but one is a poster, so 17", "I said 18 earlier, but it is 17", 18명으로 세었으나 한 명은 포스터라서.
    r"|\d\s(?:people\s)?at\sfirst\s(?:glance|sight)\b[^.;]{0,40}?\b(?:but|however)\b(?:[^.;]{0,50}?\bso\b)?"
    r"|\bi\s(?:first\s|initially\s|originally\s)?(?:thought|said|guessed|assumed)\b[^.;\d]{0,20}\d+(?!\d)(?:\s(?:people|persons))?"
    r"(?:\s(?:earlier|before|at\sfirst))?\s?(?:$|,?\s?but\b)"
    r"|\d\s?명(?:으로|처럼)\s?(?:세었|셌|세어|보았|봤|보였|보이|생각했)[가-힣]{0,3}(?:으나|지만|는데)(?:[^.]{0,30}?(?:라서?|여서|이므로|이니|니까)(?=\s))?"
    # "25, no, 27", "I thought 25, but there are 27", 25명인 줄 알았는데.
    r"|(?<=\d)\s?[,–-]\s?no,?(?=\s\d)"
    r"|\bi\s(?:(?:first\s|initially\s|originally\s)?(?:thought|guessed|assumed)|(?:first|initially|originally)\s"
    r"(?:counted|saw|found|had))\b[^.;]{0,40}?\d[^.;]{0,20}?\bbut\b"
    r"|\d\s?(?:명|사람)?(?:인|이라고|으로|라고)\s?(?:줄|생각|봤|보았|셌|했|하였|말했|말씀드렸|답했)[가-힣 ]{0,6}(?:는데|지만|으나)"
    r"|(?:^|[\s,.])(?:아니,|아니(?=\s\d)|아니다[,.]|아뇨,|정정(?:하면|합니다|하겠습니다)?[:,.]?|다시\s?(?:세|보니|확인)[가-힣]{0,4}"
    r"|수정[:합하][가-힣]{0,3})"
)
DENIED = re.compile(
    rf"(?:\bnot|n't)\s\d+(?!\d)(?:{COUNTED})?,\s(?=(?:it's|it\sis|there\sare|but|rather)\b)|,\s?(?:and\s)?not\s\d+(?!\d)(?:{COUNTED})?(?=\s?(?:[.,!]|$))|(?:\bnot|n't)\s\d+(?!\d){COUNTED}?,?\s?(?:but(?:\srather)?\s|(?=\d)|–\s?)|\d+\s?(?:명|인|사람)?(?:이|가)?\s?(?:아니라|아니고|말고|아닌(?=\s(?:약\s)?\d))"
)

# --- What a number's surroundings make of it ---------------------------------------------------------------------------
AT_LEAST = r"at (?:the |a )?(?:very |absolute |bare )?(?:least|most|minimum|maximum|outside)"
BOUND_BEFORE = re.compile(
    rf"(?:{AT_LEAST}|(?:more|less|fewer|greater|higher|lower|larger|other|better|bigger|smaller) than|\bover|under|below"
    r"|above|(?<!adds )(?<!add )(?<!sums )(?<!adding )up to|upwards? of|minimum(?: of)?|max(?:imum)?(?: of)?|in excess of"
    r"|exceed(?:s|ing|ed)?|beyond|north of|south of|past|nearly|almost|close to|closer to|near to|approaching|shy of"
    r"|short of|not quite|barely|hardly|scarcely|well into the|[<>≥≤±]=?|\+/?-|as many as|as few as|\bno"
    r"|(?:\bnot|n't)(?: see| exactly| quite| even| be)?|easily|a good|\bevery|\bper|another|additional|extra|\bplus"
    r"|(?:excluding|without|except(?: for)?|not counting|minus|besides|apart from|other than|aside from|in addition to"
    r"|n?either|between|anything from|anywhere from|starting from)(?: the)?"
    r"|최소|최소한|최대|최대한|적어도|많아야|많아\s?봐야|많아\s?봤자|많아도|(?:못|적게)\s?잡아도|못해도|기껏해야|거의|추가로|이외에|외에|제외하고|빼고|나머지|줄잡아|많으면|적으면|많게는|적게는"
    r"|하루에?|매일|각각|각|만약)\s?(?:about\s|약\s)?$"
)
MORE_OR_LESS = r"(?:more|fewer|less|above|over|higher|greater|better|beyond|under|below|upwards?)\b"
# 이 조금 넘습니다, 도 채 안 됩니다, 보다 훨씬 많습니다, 에 못 미칩니다.
KOREAN_BOUND = (
    r"(?:이|가|은|는|을|보다|보다는|도|이나|에|에서)?\s?(?:(?:족히|확실히|분명히|충분히|약간|조금|좀|살짝|훨씬|채|훌쩍|더|거뜬히|한참)\s?){0,3}"
    r"(?:넘|안\s?[되돼됩될됐된]|되지|못|모자|부족|많|적[은습다어지]|웃돌|밑돌|육박|가까|근접|이상|이하|미만|초과|남짓|이내|안팎|내외|전후"
    r"|가까이|더\b|추가|안쪽|언저리|될까|(?:중|초|후)반|까지)"
)
BOUND_AFTER = re.compile(
    rf"^(?:\+(?!\s?\d)|\s?\+(?!\s?\d|\s?[a-z가-힣])|\s?-?plus\b(?!\s\d)|\s?-?(?:odd|ish|something)\b|\s?-?some\b(?!\sof)"
    rf"|s\b|\s?±|\s?\+/?-|\s?여(?=\s?{COUNTER}|\s|$)"
    rf"|{COUNTED}?\)?,?\s?(?:"
    rf"(?:or|and|if not|possibly|maybe|perhaps|probably) (?:a (?:few|little|bit) )?{MORE_OR_LESS}|{AT_LEAST}"
    r"|min(?:imum)?\b|max(?:imum)?\b|tops\b|and counting|give or take|and up(?:wards)?\b|upwards?\b|plus\b(?!\s\d)"
    r"|\+(?!\s?\d|\s?[a-z가-힣])|±|(?:a|an|every) (?:row|line|table|group|minute|hour|day|side|team|lane|second)\b"
    r"|(?:per|each|apiece)\b(?! (?:wear|carry|hold|with a))"
    r"|(?:excluding|not counting|not including|without|except|minus|besides|apart from|in addition)\b"
    rf"|{KOREAN_BOUND}|(?:정도|쯤|가량)\s?(?:이상|이하|넘|에서)|씩|대(?:[의로가쯤,.!]|\s|$|입니다|정도)|짜리|플러스|하고도"
    r"|(?:정도|쯤|가량)?\s?(?:또는|혹은|아니면|이나)\s?그\s?이[상하]|[은이]\s?아닙|이?\s?아니[라고에]|(?:이|을)?\s?(?:빼고|제외))"
    r"|(?:[a-z]+\s)?(?:couples|families|pairs)\s(?:and|plus)\b)"
)
RANGE_AFTER = re.compile(r"^[^.;\d]{0,40}?(?:사이|between\s(?:about\s|roughly\s)?\S+\s(?:and|to|or)\b|로\s?추산되나)")
# Between two numbers that differ: neither is stated.
HEDGE = r"(?:or|to|maybe|perhaps|possibly|probably|likely|and|versus|vs|nor|이나|나|에서|부터|또는|혹은|아니면|내지|아마도?|이거나|어쩌면|~)"
BETWEEN_TWO = re.compile(
    rf"^(?:\s?[,/~–-]?\s?|\s?(?:and|&)\s?|{COUNTED}?(?:\sor\sso\b|\s?(?:정도|쯤|가량))?[\s,(]*(?:{HEDGE}[\s,]*)+(?:{APPROXIMATELY}\s?"
    rf"|even\s|as many as\s|up to\s|at most\s)*)$"
)
JOINED = re.compile(rf"^\s?(?:and|&)\s?$|^{COUNTED}[\s,(]*and\s?$")
DASHED = re.compile(rf"^{COUNTED}?\s?[/~–-]\s?$")
# Of a whole that is stated elsewhere.
PART_BEFORE = re.compile(
    r"(?:including|includes?|of (?:which|whom)|among (?:them|whom|which|these|those)|of (?:these|those"
    r"|them)|with|comprising"
    r"|consisting of|made up of|i\.e\.,?|namely|그\s?중에?서?|이\s?중에?서?|중에?서?|가운데|중|그\s?(?:중에?서?|가운데)\s?\S{1,8}[이가은는도])(?:\s(?:about|only"
    r"|just|at least|probably|는|약))?[,:]?\s?$"
)
OF_WHOM_AFTER = re.compile(r"^,?\s\S+(?:\s\S+)?\sof\swhom\b")  # "Seventeen, five of whom are leaving"
ALL = re.compile(r"\ball\s?$")  # "All 27 of them are walking."
OF_THEM = re.compile(r"^ of (?:them|these people|those people)\b")
WHOLE_BEFORE = re.compile(r"(?:\ball|\bof the|out of(?: the)?|among the|of these|of all|\bof)\s?$")
WITH = re.compile(r"\bwith\s?$")  # "a bus with 19 passengers": the whole, where none is stated
WITH_ANYBODY = re.compile(rf"^\s{GENERAL}")
WHOLE_AFTER = re.compile(rf"^\s?{COUNTER}\s?(?:중|가운데)")
TOTAL_BEFORE = re.compile(
    r"(?:\b(?:final )?answer(?: is| would be)?|정답은?|최종\s?(?:인원|답)[은는]?|결론[은:]?"
    r"|\btotal(?:s|ing|ling|led|ed)?(?: (?:number|count|people|persons|of people|headcount|crowd))?(?: (?:is"
    r"|are|of|to|comes? to|in the \w+|visible))*"
    r"|\b(?:so|hence|thus|therefore|in total|altogether|overall|in all|all told|all together|in sum|combined|summing up|sum(?:s)? (?:of"
    r"|to|up to)|sum|grand total|adds? up to"
    r"|adding up to|for a total of|that(?:'s| is)|which (?:makes|gives)|all in all|people in total)(?:,? (?:there (?:are"
    r"|is|were)|i (?:count|see)|we have|it is|it's|that's|that makes|makes))?"
    r"|(?:^|[^가-힣])(?:총계?|총원|총수|총인원|총합|총\s?인원|총\s?사람|모두|전부|도합|합계|합쳐서?|합치면|합하면|합해서?|더하면|다\s?합쳐|통틀어"
    r"|전체|총\s?\S{1,3}\s?수|전체\s?인원|합|계)(?:은|는|이|수|하여|다)?)"
    rf"\s?[:=,-]?\s?(?:(?:people|사람|인원)\s?[:=]?\s?)?(?:{APPROXIMATELY}\s?)*$"
)
TOTAL_AFTER = re.compile(
    rf"^{COUNTED}?\)?(?:\s(?:in total|altogether|in all|all told)\b|,?\s?(?:in total|altogether|in all|total|all told"
    r"|all together|overall|combined|in sum|as a whole)\b"
    r"(?!,?\s?(?:[:=]|of\b|is\b|comes|makes|\d|there\b|i\b|we\b|people\s?[:=]?\s?\d|number|count)))"
)
PLACE = re.compile(
    r"\b(?:left|right|foreground|background|front|back|rear|top|bottom|upper|lower|near(?:er)? (?:end"
    r"|side)|far (?:end|side)|centre|center|middle"
    r"|inside|outside|upstairs|downstairs|corner|side|another|other|one (?:group|side)|first|second"
    r"|third|distance|escalator|stairs|bench|zone|floor)\b"
    r"|왼쪽|오른쪽|좌측|우측|앞쪽|뒤쪽|앞에|뒤에|위쪽|아래쪽|위에|아래에|안쪽|바깥|가운데|중앙|구역|층|상단|하단|전경|배경|밖에|안에는|근처|옆|쪽"
)
SUBGROUP_AFTER = re.compile(
    r"^\s?(?:[a-z]+\s)?(?:men|women|adults|children|kids|boys|girls|males|females|ladies)\b|^\s?명의\s?(?:남"
    r"|여|아이|어린이|어른|성인)"
)
SUBGROUP = re.compile(
    r"\b(?:m[ae]n|wom[ae]n|adults?|child(?:ren)?|kids?|boys?|girls?|males?|females?|lad(?:y|ies)|seated"
    r"|standing|sitting|walking)\b"
    r"|(?:남|여)(?:자|성|학생|(?=\s?:?\s?\d))|아이|어린이|어른|성인|노인"
)
GROUPED = re.compile(
    r"\b(?:groups|rows|lines|pairs|teams|queues|tables|columns|clusters|sets|files) (?:of|with|having) (?:about )?$"
    r"|(?:한|각|매|1)\s?(?:줄|팀|조|그룹|열|테이블|반)(?:에|당|마다)?\s?$|마다\s?$|당\s?$"
)
# A number for each of several, or the others left without a number: no total.
SHARED_OUT = re.compile(
    r"\b(?:on|in|at|for|from|to|per|with) (?:each|every|either)\b|\b(?:every|each) (?:minute|hour"
    r"|day|second|time|row|line|side|floor)s?\b"
    r"|(?:^|\s)(?:각|매) ?\S{1,4}(?:에|마다)|마다|매(?:일|시간|분|초)|(?:\b|(?<=[.,] ))(?:the )?(?:rest|remaining"
    r"|remainder)\b|\bthe others\b"
    r"|\beveryone else\b|나머지|그 ?외(?!에?는?\s\S{1,12}\s\d+\s?(?:개|대|마리|그루))"
)
# People that are named but not counted, joined to a number: "a man and 3 children", "several adults and 3 children".
UNCOUNTED = re.compile(
    rf"\b(?:an?|another|the other|several|some|a few|few|(?<!not )(?<!n't )many|various|numerous|multiple|a couple of"
    rf"|countless)\s(?:[a-z-]+\s){{0,2}}?{PEOPLE}"
    r"|\b(?:many|several|some|a few|lots|plenty|dozens) (?:more|others)\b"
    r"|\b(?:an?|one|two|three)\s(?:[a-z]+\s)?(?:couples?|famil(?:y|ies)|pairs?)\b(?!\sof\s\d)"
    r"|(?<!명의\s)(?:남자|여자|남성|여성|아이|어린이|엄마|아빠|할머니|할아버지|노인|소년|소녀|학생|경비원|직원|어른)들?(?:와|과|하고|이랑|랑)\s"
    r"|명(?:과|이랑|하고)\s(?:다른\s)?(?:남자|여자|남성|여성|아이|어린이|경비원|직원|학생|노인|어른)(?:들)?(?:이|가|$|[.,])"
    r"|부부|커플|[두세네]\s쌍|여러\s?명|몇\s?명|다른\s?사람들"
)
YEAR = re.compile(r"(?:19|20)\d\d")
# What may stand around a bare number ("There are 7.", "답: 7") without giving it another meaning.
FILLER = re.compile(
    r"(?:there|are|is|d|m|ve|re|ll|was|were|be|been|it|it's|i|i'd|i'm|i've|we|my|our|me|you|your|can|could|would"
    r"|will|see|seen|sees|say|says|count|counted"
    r"|counting|answer|total|totals|number|sum|result|results|final|output|response|estimate|estimated"
    r"|estimation|guess|best|headcount|head"
    r"|tally|in|of|on|at|a|an|the|this|that|these|here|have|has|had|got|get|gives|frame|image|picture"
    r"|photo|scene|view|shot|video|footage|camera"
    r"|screen|snapshot|cctv|still|mall|hall|hallway|corridor|street|room|lobby|station|plaza|square"
    r"|park|store|shop|area|place|building|crowd|group|visible|shown|present"
    r"|detected|found|identified|spotted|or|so|s|somewhere|neighbou?rhood|region|vicinity|not|aren't|isn't|many|crowded|few|several|busy|quick|yes|yeah|yep|sure|ok|okay|well|hmm|um|uh|oh|right"
    r"|now|currently|all|together|altogether|overall|everyone"
    r"|think|believe|put|place|looking|again|closely|closer|checking|rechecking|looks|look|like|seems|seem|appears|appear|to|probably|maybe|perhaps"
    r"|possibly|likely|comes|come|makes|making|equals|as|by|carefully"
    rf"|text|mathrm|approx|ca|r|people's|just|single|lone|empty|deserted|hello|hi|thanks|thank|{APPROXIMATELY}|{PEOPLE})(?![a-z])"
    r"|(?:네|예|응|음|사람들?|인원|수|답변?|정답|결과|총|모두|전부|화면|사진|이미지|영상|장면|프레임|합계|보이는|보기에|제가|세어|보니|현재|지금|명|정도|쯤|가량|아마"
    r"|에는?|에서|속|안|의|은|는|이|가|를|을|로|으로|입니다|이에요|예요|이요|이다|요|네요|있습니다|보입니다|있어요|보여요|같습니다|같아요|것|추정|됩니다|계수"
    r"|숫자|개|인|정답은|약)+(?![가-힣])"
    r"|[^\w%$€₩°#]+"
)

# --- The text, made even -----------------------------------------------------------------------------------------------
EVEN = [
    (r"[\u200b-\u200f\u2060\ufeff\u00ad\ufe0f\u20e3]", ""),
    (r"(?<=\d)[\u202f\u2009\u2007\u00a0](?=\d{3}(?!\d))", ","),
    (r"[⁰¹²³⁴-⁹]+", " "),
]
EVEN_AFTER_NFKC = [
    (r"[‐‑⁃−]", "-"),
    (r"[‒–—―⸺]", "–"),
    (r"[〜∼～]", "~"),
    (r"[’‘`´]", "'"),
    (r"、", ", "),
    (r"。", ". "),
    (r"(?<=[a-z])(?=[A-Z][a-z])", " "),  # peopleCount
]
EVEN_LOWER = [
    (r"\d{10,}|(?:\d{1,9}[.,]){6,}\d+", "9999999999"),  # a model that repeats itself; patterns then look no further
    (r"~~[^~\n]{1,80}~~", " "),  # struck out
    (r"<(think|thinking|reasoning|scratchpad)>[\s\S]{0,20000}?</\1>", " "),  # what a model tells itself
    (r"\?\s+no,\s", "? "),  # "14 people? No, looking again it's 15."
    (r"\b(?:go|going|settle|settling|stick|sticking) (?:with|for|on)\b", "say"),
    (rf"(\b{PEOPLE}) plus (?!(?:the|an?|my|some|several|few|no) )(?=\S+ (?:{ANYBODY}|{SOMEBODY}))", r"\1 and "),
    (r"```[a-z]{0,10}|'''[a-z]{0,10}", " "),
    (r"\\(?:geq?|ge)\b", "≥"),
    (r"\\(?:leq?|le)\b", "≤"),
    (r"\\(?:approx|sim|simeq)\b", "~"),
    (r"\\pm\b", "±"),
    (r"\\times\b", "x"),
    (r"\\%", "%"),
    (r"\${1,2}([^$\n]{1,60})\${1,2}", r" \1 "),
    (r"\\[a-z]+\s?|\\[()\[\]]", " "),
    (r"</?(?:b|i|u|em|strong|p|span|div|mark|td|tr|th|table|li|ul|ol|br|code|pre)\s?/?>", " "),
    (r"(?<=\d)\s?x (?=(?:person|people)\b)", " "),
    (r"(?<=\d)(?:\.{2,3}|…)\s(?=no,?\s\d)", ", "),
    (r"(?<=\d) (?:plus|더하기) (?=\d)", " + "),
    (r"\bequals\b", "="),
    (r"(?m)\s?(?:=>|->|⇒|→|➜)\s?(?=\d+\s?(?:people|persons|명)?[.!]?$)", " = "),
    (r"=>|->|⇒|→|➜", ": "),
    (r"(?m)^#{1,6} (?=\d+[.!]?$)", ""),  # a headline
    (r"<([a-z_ ]{1,30})>([^<\n]{0,200})</\1>", r" \1: \2. "),
    (r"<[/|]?[a-z_|][^<>\n]{0,40}>", " "),
    (r"\*|(?<![a-z])_|_(?![a-z])", ""),
    (r"_", " "),
    (r'["“”„「」『』]|(?<![a-z])\'|\'(?![a-z])', ""),
    (r"(?m)^[ |:-]+$", ""),  # the rule of a table
    (r"(?<=\d)\s?\|", ". "),  # the end of a cell
    (r"\|", " : "),
    (r"(?m)^#+\s?([^\n]{1,80})\n+", r"\1: "),
    (r":\s*\n+\s*", ": "),
    (r"\bapprox\.|\bca\.|\bc\.\s?(?=\d)|\best\.", "about "),
    (r"\bmax\.", "maximum "),
    (r"\bmin\.", "minimum "),
    (r"\bno\.\s?(?=\d)", "number #"),
    (r"[^\S\n]+", " "),
    (
        r"(?<![가-힣])한 (?=약 |대략 |\d|[일이삼사오육칠팔구]?[십백천]|(?:열|스물|스무|서른|마흔|쉰|예순|일흔|여든|아흔|세|네|다섯|여섯|일곱|여덟|아홉))",
        "약 ",
    ),
    (r"(?<=[열물른흔쉰순든백]) 약 (?=[세네다여일여아])", " 한 "),
    (r"(?<![가-힣])한 (?=두 ?(?:명|사람))", "한"),
    (r"(?<=[열물른흔쉰순든백]) ?하고도? (?=[한두세네다여일아])", " "),  # 스물 하고도 여섯
]
# A number of other things has their name behind it: "3 floors", "2 parked cars", "1 bus", "26 km". A number with
# anything else behind it may be people: "20 are walking", "25 further away".
THINGS = (
    r"(?!(?:was|is|has|as|this|its|his|across|towards|upstairs|downstairs|outdoors|indoors|besides"
    r"|always|perhaps|others|makes"
    r"|gives|equals|sits|stands|walks|wears|carries)\b)[a-z-]*[a-z](?<!s)s"
)
OTHER_THINGS = re.compile(
    rf"^(?:-?\s?(?:(?!(?:{FUNCTION_WORDS})\b)[a-z][a-z-]*\s)??(?!(?:{FUNCTION_WORDS})\b){THINGS}(?![a-z])"
    r"|\s?(?:km|cm|mm|m2?|kg|px|fps|hz|s|sec|min|ms|mb|gb|hrs?|usd|eur|krw|k|x|th|st|nd|rd|p|percent|luggage"
    r"|sheep|fish|feet|mice|fps)\b"
    r"|\s?[가-힣]+)"
)
KOREAN_GOES_ON = re.compile(
    r"^\s?(?:입니다|입니당|이다|이에요|예요|이요|요(?![가-힣])|이고|이며|으로|로\s|정도|쯤|가량|이\s|은\s|과\s|도\s|이서)"
)
ONE_THING = re.compile(rf"^\s(?:(?!(?:{FUNCTION_WORDS})\b)[a-z][a-z-]*\s)??(?!(?:{FUNCTION_WORDS})\b)[a-z]{{3,}}\b")
PART_AFTER = re.compile(
    rf"^{COUNTED}?\s?(?:of (?:them|whom|these|those|which|the)\b(?! (?:public|staff|crew|team|audience"
    rf"|family|group|police))|out of\b|(?:을|이|를)?\s?(?:포함|비롯)"
    r"|\s?명은\s(?:아이|어린이|남자|여자|남성|여성|어른|성인|노인|학생)(?:입니다|이다|이에요|예요|이고|이며|[,.]))"
)
OPENS = re.compile(
    rf"^{COUNTED}?[^:(–.;\d]{{0,40}}(?:[:(–]|\s-\s)|^{COUNTED}?,?\s(?:including|of whom|of which|with"
    rf"|among)\b|^\s?{COUNTER}\s?(?:중|가운데)"
)


NO_ONE = re.compile(r"\bno one\b")
BRACKET = re.compile(r"[(\[=]\s?$|^\s?$")
SUM_AFTER = re.compile(rf"^{COUNTED}?\s?\+\s?\d")  # "Total: 6 + 8 = 14"
APPOSITION = re.compile(rf"{COUNTED}\s?[,:(–-]\s?")  # "one person, a man"
SUM_BEFORE = re.compile(r"\d[^=\d]{1,30}\d[^=\d]{0,30}=\s?$")
# "A man, a woman and a child: three people" counts what it lists.
ONE_OF_A_LIST = re.compile(rf"\b(?:an?|another)\s+(?:[a-z-]+\s){{0,2}}?{PEOPLE}")
SAID_OF_A_LIST = re.compile(r"[:=–]\s?(?:so\s|that's\s|that makes\s|making\s)?(?:a total of\s)?$|\s-\s$")
RESULT_BEFORE = re.compile(r"=\s?$")
JOINS = re.compile(r"(?:\b(?:and|plus)\b|&|과|와|하고|[,+])[^,.]{0,30}$")
NEXT_PART = re.compile(r"(?:\band|&|\bplus|와|과|그리고|,)\s?(?:약\s?|about\s)?$")
KOREAN_NOUN_AFTER = re.compile(rf"\s?{KOREAN_PEOPLE}")
NUMERAL = numeral_pattern(rf"(?:{COUNTER}|{KOREAN_PEOPLE})", FORMAL_COUNTER, HONORIFIC)
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+|(?<=[가-힣]\.)|;")
FIRST_LIST_MARK = re.compile(r"(?m)^(?:[-•]\s?)?\(?1[.)]\s(?=\S)")
