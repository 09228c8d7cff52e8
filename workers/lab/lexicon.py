"""Words of the lab's grammar: what each one means in four languages, and how it inflects.

Chosen so that no rule of spelling is needed that text without punctuation cannot show: no French
noun or adjective takes an apostrophe, no French or Spanish preposition melts into the article, and
no noun looks like an adjective (German `junge` would be both a boy and young). The tables are text,
since a table of words is easier to check by eye than constructor calls.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

Size = Literal["full", "tiny"]
Gender = Literal["m", "f", "n"]


@dataclass(frozen=True)
class Noun:
    """A noun; forms are `(singular, plural)`."""

    en: tuple[str, str]
    de: tuple[str, str]
    de_gender: Gender
    fr: tuple[str, str]
    fr_gender: Gender
    es: tuple[str, str]
    es_gender: Gender
    animate: bool


@dataclass(frozen=True)
class Adjective:
    """An adjective; French and Spanish forms are `(m, f, m plural, f plural)`."""

    en: str
    de: str
    fr: tuple[str, ...]
    fr_before_noun: bool
    es: tuple[str, ...]
    of: Literal["all", "animate", "thing"]


@dataclass(frozen=True)
class Verb:
    """A verb in the present, third person; forms are `(singular, plural)`."""

    en: tuple[str, str]
    de: tuple[str, str]
    fr: tuple[str, str]
    es: tuple[str, str]


@dataclass(frozen=True)
class Preposition:
    """A preposition; `case` is the one German asks for, `of` what it may stand before."""

    en: str
    de: str
    fr: str
    es: str
    case: Literal["accusative", "dative"]
    of: Literal["animate", "thing"]


@dataclass(frozen=True)
class Adverb:
    """An adverb that opens the sentence (German then puts the verb second)."""

    en: str
    de: str
    fr: str
    es: str


@dataclass(frozen=True, eq=False)
class Lexicon:
    """All words of one size of the grammar."""

    nouns: tuple[Noun, ...]
    adjectives: tuple[Adjective, ...]
    transitive: tuple[Verb, ...]
    intransitive: tuple[Verb, ...]
    prepositions: tuple[Preposition, ...]
    adverbs: tuple[Adverb, ...]

    @cached_property
    def beings(self) -> tuple[Noun, ...]:
        """Nouns that can be a subject."""
        return tuple(noun for noun in self.nouns if noun.animate)

    @cached_property
    def things(self) -> tuple[Noun, ...]:
        """The other nouns."""
        return tuple(noun for noun in self.nouns if not noun.animate)

    def nouns_after(self, preposition: Preposition) -> tuple[Noun, ...]:
        """Nouns that may stand after a preposition."""
        return self.beings if preposition.of == "animate" else self.things

    @cached_property
    def _adjectives_of(self) -> dict[bool, tuple[Adjective, ...]]:
        return {
            animate: tuple(a for a in self.adjectives if a.of in ("all", kind))
            for animate, kind in ((True, "animate"), (False, "thing"))
        }

    def adjectives_of(self, noun: Noun) -> tuple[Adjective, ...]:
        """Adjectives that may describe a noun."""
        return self._adjectives_of[noun.animate]


# English | German, gender | French, gender | Spanish, gender | what it is
_NOUNS = """
woman women | frau frauen f | femme femmes f | mujer mujeres f | animate
boy boys | junge jungen m | garçon garçons m | niño niños m | animate
girl girls | mädchen mädchen n | fille filles f | niña niñas f | animate
dog dogs | hund hunde m | chien chiens m | perro perros m | animate
cat cats | katze katzen f | chat chats m | gato gatos m | animate
horse horses | pferd pferde n | cheval chevaux m | caballo caballos m | animate
king kings | könig könige m | roi rois m | rey reyes m | animate
doctor doctors | arzt ärzte m | médecin médecins m | médico médicos m | animate
teacher teachers | lehrer lehrer m | professeur professeurs m | profesor profesores m | animate
cow cows | kuh kühe f | vache vaches f | vaca vacas f | animate
mother mothers | mutter mütter f | mère mères f | madre madres f | animate
house houses | haus häuser n | maison maisons f | casa casas f | thing
table tables | tisch tische m | table tables f | mesa mesas f | thing
book books | buch bücher n | livre livres m | libro libros m | thing
car cars | auto autos n | voiture voitures f | coche coches m | thing
door doors | tür türen f | porte portes f | puerta puertas f | thing
garden gardens | garten gärten m | jardin jardins m | jardín jardines m | thing
bridge bridges | brücke brücken f | pont ponts m | puente puentes m | thing
flower flowers | blume blumen f | fleur fleurs f | flor flores f | thing
boat boats | boot boote n | bateau bateaux m | barco barcos m | thing
window windows | fenster fenster n | fenêtre fenêtres f | ventana ventanas f | thing
city cities | stadt städte f | ville villes f | ciudad ciudades f | thing
chair chairs | stuhl stühle m | chaise chaises f | silla sillas f | thing
letter letters | brief briefe m | lettre lettres f | carta cartas f | thing
"""

# English | German stem | French, place | Spanish | what it may describe
_ADJECTIVES = """
small | klein | petit petite petits petites before | pequeño pequeña pequeños pequeñas | all
big | groß | grand grande grands grandes before | grande grande grandes grandes | all
old | alt | vieux vieille vieux vieilles before | viejo vieja viejos viejas | all
strong | stark | fort forte forts fortes after | fuerte fuerte fuertes fuertes | animate
sad | traurig | triste triste tristes tristes after | triste triste tristes tristes | animate
red | rot | rouge rouge rouges rouges after | rojo roja rojos rojas | thing
black | schwarz | noir noire noirs noires after | negro negra negros negras | thing
green | grün | vert verte verts vertes after | verde verde verdes verdes | thing
"""

_TRANSITIVE = """
sees see | sieht sehen | voit voient | ve ven
buys buy | kauft kaufen | achète achètent | compra compran
finds find | findet finden | trouve trouvent | encuentra encuentran
wants want | will wollen | veut veulent | quiere quieren
loves love | liebt lieben | aime aiment | ama aman
draws draw | zeichnet zeichnen | dessine dessinent | dibuja dibujan
paints paint | malt malen | peint peignent | pinta pintan
"""

_INTRANSITIVE = """
sleeps sleep | schläft schlafen | dort dorment | duerme duermen
waits wait | wartet warten | attend attendent | espera esperan
sings sing | singt singen | chante chantent | canta cantan
works work | arbeitet arbeiten | travaille travaillent | trabaja trabajan
"""

# English | German | French | Spanish | case in German | what it stands before
_PREPOSITIONS = """
before | vor | devant | ante | dative | thing
under | unter | sous | bajo | dative | thing
behind | hinter | derrière | tras | dative | thing
with | mit | avec | con | dative | animate
for | für | pour | para | accusative | animate
"""

_ADVERBS = """
now | jetzt | maintenant | ahora
here | hier | ici | aquí
sometimes | manchmal | parfois | a veces
often | oft | souvent | a menudo
"""

_TINY = """
woman girl dog cat house table book small old sees buys wants sleeps sings
"""
"""English words of the micro grammar, about 30 forms a language."""


@cache
def lexicon(size: Size) -> Lexicon:
    """The words of one size: `full`, or `tiny` for tests."""
    tiny = set(_TINY.split())

    def rows(table: str) -> list[list[list[str]]]:
        cells = [[cell.split() for cell in row.split("|")] for row in table.strip().splitlines()]
        return [row for row in cells if size == "full" or row[0][0] in tiny]

    def verbs(table: str) -> tuple[Verb, ...]:
        return tuple(Verb(*((one, many) for one, many in row)) for row in rows(table))

    def words(row: list[list[str]]) -> list[str]:
        return [" ".join(cell) for cell in row]

    nouns = tuple(
        Noun(
            en=(en[0], en[1]),
            de=(de[0], de[1]),
            de_gender=de[2],  # type: ignore[arg-type]
            fr=(fr[0], fr[1]),
            fr_gender=fr[2],  # type: ignore[arg-type]
            es=(es[0], es[1]),
            es_gender=es[2],  # type: ignore[arg-type]
            animate=kind == ["animate"],
        )
        for en, de, fr, es, kind in rows(_NOUNS)
    )
    adjectives = tuple(
        Adjective(
            en=en[0],
            de=de[0],
            fr=tuple(fr[:4]),
            fr_before_noun=fr[4] == "before",
            es=tuple(es),
            of=of[0],  # type: ignore[arg-type]
        )
        for en, de, fr, es, of in rows(_ADJECTIVES)
    )
    return Lexicon(
        nouns=nouns,
        adjectives=adjectives,
        transitive=verbs(_TRANSITIVE),
        intransitive=verbs(_INTRANSITIVE),
        prepositions=tuple(Preposition(*words(row)) for row in rows(_PREPOSITIONS)),  # type: ignore[arg-type]
        adverbs=tuple(Adverb(*words(row)) for row in rows(_ADVERBS)),
    )
