"""Word lists for the synthetic tasks. Data only."""

from __future__ import annotations


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


WORDS: tuple[str, ...] = _split("""
apple river stone window table chair garden flower mountain forest ocean island bridge castle
road street house door key lock light lamp fire water earth wind cloud rain snow storm summer
winter spring autumn morning evening night day week month year sun moon star planet sky sea lake
valley desert field grass tree leaf root seed branch bird fish horse sheep goat wolf bear lion
tiger mouse rabbit snake frog duck goose eagle owl bee ant spider bread butter cheese milk sugar
salt pepper rice soup meat egg orange lemon banana grape peach cherry berry book paper pen
pencil letter word page story song music drum piano violin guitar dance game ball toy doll king
queen prince knight soldier farmer teacher doctor baker sailor pilot driver singer writer
painter friend mother father sister brother baby child uncle aunt cousin family hand foot head
heart eye ear nose mouth hair red green blue yellow white black brown pink purple gray gold
silver iron copper steel wood glass paint brick happy sad angry brave calm kind proud shy quick
slow loud quiet warm cold hot cool wet dry soft hard heavy small large tall short long wide
narrow deep round flat sharp clean dirty new old young rich poor strong weak run walk jump swim
climb fly drive ride sing read write draw build break open close push pull carry throw catch
find lose give take buy sell send bring keep hold turn move stop start learn teach think know
hear see north south east west left right up down over under near far first last next early late
always never often box bag cup plate bowl spoon fork knife bottle basket clock watch phone radio
camera train ship boat plane car truck wheel engine rope chain wire nail hammer ladder tower
wall roof floor room kitchen school church market shop bank city town village country nation
world space time money number circle square line point shape color dream hope fear love peace
war truth secret answer question idea plan test rule law name place thing power coat shirt shoe
hat glove ring crown button pocket thread needle cotton wool silk leather fur cake candy honey
""")

FIRST_NAMES: tuple[str, ...] = _split("""
Alice Bob Carol David Emma Frank Grace Henry Irene Jack Karen Leo Maria Nina Oscar Paul Quinn
Rosa Sam Tina Uma Victor Wendy Xavier Yara Zoe Adam Bella Carlos Diana Elena Felix Gina Hugo
Ivan Julia Kevin Laura Marco Nora Omar Priya Rahul Sofia Thomas Ursula Vera Walter Yusuf Zara
Ahmed Bianca Chen Daria Erik Fatima George Hana Ines James Kenji Lina Mei Noah Olga Peter Rita
Stefan Tara Umar Valeria William Ximena Yuki Zachary Anna Ben Clara Daniel Eva Finn Greta Hans
Isabel Jonas Kate Lucas Mia Nils Olivia Pablo Ruth Simon Theo Lily
""")

CITIES: tuple[str, ...] = _split("""
Paris London Berlin Madrid Rome Vienna Prague Warsaw Lisbon Dublin Oslo Stockholm Helsinki
Athens Cairo Nairobi Lagos Accra Tunis Delhi Mumbai Tokyo Osaka Kyoto Seoul Beijing Shanghai
Hanoi Bangkok Manila Jakarta Sydney Melbourne Auckland Toronto Montreal Vancouver Chicago Boston
Seattle Denver Austin Dallas Miami Lima Bogota Quito Santiago Havana Munich Hamburg Zurich
Geneva Milan Naples Turin Porto Seville Valencia Krakow Budapest Bucharest Sofia Riga Tallinn
Vilnius Istanbul Ankara Tehran Dubai Doha Karachi Lahore Dhaka Colombo Perth
""")

JOBS: tuple[str, ...] = _split("""
teacher doctor nurse baker farmer pilot driver singer writer painter lawyer plumber carpenter
cook waiter programmer scientist gardener librarian mechanic tailor butcher barber dentist judge
sailor soldier journalist
""")

COLORS: tuple[str, ...] = _split(
    "red green blue yellow white black brown pink purple gray orange turquoise"
)

PETS: tuple[str, ...] = _split(
    "cat dog hamster rabbit parrot turtle goldfish pony snake lizard canary ferret"
)

SYLLABLES: tuple[str, ...] = _split("""
ba be bi bo da de di do fa fe ga go ha he ka ke ki ko la le li lo ma me mi mo na ne ni no pa pe
ra re ri ro sa se si so ta te ti to va ve vi wa wo ya yo za ze zi lan mar ron tel vin dor sen
bel kar nor
""")

FUNCTION_WORDS: tuple[str, ...] = _split("""
compute get calc make find helper value result number test func process apply run do my quick
simple fast item data check convert transform build solve
""")
