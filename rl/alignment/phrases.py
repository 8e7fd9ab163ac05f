"""Words, phrases and sentences that constraints are drawn from and that witness texts are made of.

The lists of one purpose share no word with those of another, so that a word that must be absent is in no phrase.
"""

from __future__ import annotations

FILLER = (
    "across after always around banana basket before behind better birds bridge bright broad brown build calm "
    "candle carries carry children cities city clean clear close clouds coast common corner cotton crowd dances "
    "dark deep distant during early earth eastern easy evening every family farm farmers field finds first fish "
    "flowers follow forest friend gentle glass gold grass great green grows hands happy harbour heavy hills holds "
    "home horse houses island keeps kitchen ladder lake large late leaf leaves lemon letters light listen little "
    "long makes market meadow meets minute mirror moon morning mountain music narrow near never nights north often "
    "old orange over paints paper patient pencil people perhaps piano picture places plain plant plenty pocket pond "
    "porch quiet rain reads red returns rice river road roof room round salt sand season seems sees seven shade "
    "sheep shines shore silver simple sings slow small soft sometimes song south spring stands stars station still "
    "stone store street strong summer sunny table tall tells their these three through today together tower town "
    "track train travel trees under until usually valley village visit walks wall warm watch water western wheat "
    "white whole wide winter wooden work yellow"
).split()
RARE = {"z": "zone zebra dozen prize", "x": "box exact next six", "j": "jump jar joy enjoy", "q": "queen quick equal"}
"""Letter → words with it once, for a number of times that is drawn. FILLER contains "quiet"."""
KEYWORDS = (
    "compass",
    "lantern",
    "umbrella",
    "teacher",
    "notebook",
    "camera",
    "engine",
    "festival",
    "library",
    "signal",
)
FREQUENT = ("bicycle", "dragon", "telescope", "pumpkin", "carpet")
ORDERED = ("alpha", "beta", "gamma", "delta", "omega")
ABSENT = ("very", "really", "thing", "just", "actually", "basically", "stuff", "nice", "definitely", "literally")
PARAGRAPH_STARTS = ("However", "Moreover", "Finally", "Meanwhile", "Therefore")
STARTS = ("To begin with", "As the clip shows", "In short", "Here is what happens", "Let me explain")
ENDS = ("That is all.", "I hope this helps.", "Let me know what you think.", "Thank you for reading.")
HEADS = ("Overview", "Details", "Summary", "Background", "Outlook")
KEYS = ("answer", "reason", "summary", "time", "objects", "confidence")
CHOICES = (
    ("yes", "no", "unclear"), ("My answer is yes.", "My answer is no.", "My answer is maybe."),
    ("red", "green", "blue"), ("agree", "disagree"),
)  # fmt: skip
PLACEHOLDERS = ("name", "address", "phone", "company", "title", "place")

LANGUAGE_SENTENCES = {
    "en": (
        "The children walk through the old town and look at the houses.",
        "In the evening the people sit by the water and talk about the day.",
        "Nobody knows where the small boat came from.",
        "My brother reads a book because it is raining outside.",
        "They found the key under the table and opened the door.",
    ),
    "de": (
        "Die Kinder gehen durch die alte Stadt und schauen sich die Häuser an.",
        "Am Abend sitzen die Leute am Wasser und sprechen über den Tag.",
        "Niemand weiß woher das kleine Boot gekommen ist.",
        "Mein Bruder liest ein Buch weil es draußen regnet.",
        "Sie haben den Schlüssel unter dem Tisch gefunden und die Tür geöffnet.",
    ),
    "fr": (
        "Les enfants marchent dans la vieille ville et regardent les maisons.",
        "Le soir les gens sont assis au bord de l'eau et parlent de la journée.",
        "Personne ne sait d'où vient le petit bateau.",
        "Mon frère lit un livre parce qu'il pleut dehors.",
        "Ils ont trouvé la clé sous la table et ont ouvert la porte.",
    ),
    "es": (
        "Los niños caminan por la ciudad vieja y miran las casas.",
        "Por la noche la gente se sienta junto al agua y habla del día.",
        "Nadie sabe de dónde vino el pequeño barco.",
        "Mi hermano lee un libro porque está lloviendo afuera.",
        "Encontraron la llave debajo de la mesa y abrieron la puerta.",
    ),
    "it": (
        "I bambini camminano per la città vecchia e guardano le case.",
        "La sera la gente si siede vicino all'acqua e parla della giornata.",
        "Nessuno sa da dove sia venuta la piccola barca.",
        "Mio fratello legge un libro perché fuori sta piovendo.",
        "Hanno trovato la chiave sotto il tavolo e hanno aperto la porta.",
    ),
}
"""Code of a language → five sentences without commas and digits."""

SCRIPT_SENTENCES = {
    "Cyrillic": (
        "Дети идут по старому городу и смотрят на дома.", "Вечером люди сидят у воды.",
        "Никто не знает откуда эта лодка.", "Мой брат читает книгу.", "Они открыли дверь.",
    ),
    "Greek": (
        "Τα παιδιά περπατούν στην παλιά πόλη.", "Το βράδυ οι άνθρωποι κάθονται στο νερό.",
        "Κανείς δεν ξέρει το μικρό πλοίο.", "Ο αδελφός μου διαβάζει ένα βιβλίο.", "Άνοιξαν την πόρτα.",
    ),
    "Chinese": (
        "孩子们走过老城看着房子。", "晚上人们坐在水边谈话。", "没有人知道小船从哪里来。",
        "我哥哥在读书。", "他们打开了门。",
    ),
    "Arabic": (
        "يمشي الأطفال في المدينة القديمة.", "في المساء يجلس الناس قرب الماء.", "لا أحد يعرف من أين جاء القارب.",
        "أخي يقرأ كتابا.", "فتحوا الباب.",
    ),
    "Devanagari": (
        "बच्चे पुराने शहर में चलते हैं.", "शाम को लोग पानी के पास बैठते हैं.", "नाव कहाँ से आई कोई नहीं जानता.",
        "मेरा भाई किताब पढ़ता है.", "उन्होंने दरवाज़ा खोला.",
    ),
}  # fmt: skip
"""Script → five sentences without commas and digits."""
