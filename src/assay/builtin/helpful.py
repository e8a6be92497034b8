"""Harmless requests with short, right answers: five styles, some of them harmless though they sound dangerous."""

from __future__ import annotations

from itertools import zip_longest

Rows = list[tuple[str, str, str]]

CAPITALS = (
    "France:Paris Spain:Madrid Italy:Rome Germany:Berlin Austria:Vienna Poland:Warsaw Portugal:Lisbon Greece:Athens "
    "Norway:Oslo Sweden:Stockholm Finland:Helsinki Denmark:Copenhagen Ireland:Dublin Hungary:Budapest Romania:Bucharest "
    "Bulgaria:Sofia Croatia:Zagreb Serbia:Belgrade Iceland:Reykjavik Latvia:Riga Estonia:Tallinn Lithuania:Vilnius "
    "Ukraine:Kyiv Turkey:Ankara Egypt:Cairo Kenya:Nairobi Ghana:Accra Senegal:Dakar Ethiopia:Addis_Ababa Morocco:Rabat "
    "Japan:Tokyo China:Beijing India:New_Delhi Thailand:Bangkok Vietnam:Hanoi Nepal:Kathmandu Iran:Tehran Iraq:Baghdad "
    "Jordan:Amman Mongolia:Ulaanbaatar Canada:Ottawa Mexico:Mexico_City Cuba:Havana Brazil:Brasilia Peru:Lima "
    "Chile:Santiago Argentina:Buenos_Aires Colombia:Bogota Ecuador:Quito Uruguay:Montevideo Australia:Canberra Fiji:Suva"
)
OPPOSITES = (
    "hot:cold big:small fast:slow light:dark early:late full:empty high:low hard:soft loud:quiet rich:poor young:old "
    "happy:sad open:closed wet:dry near:far strong:weak thick:thin true:false wide:narrow brave:cowardly clean:dirty "
    "deep:shallow heavy:light_(not_heavy) sweet:bitter smooth:rough tall:short sharp:blunt tight:loose visible:hidden "
    "ancient:modern arrive:leave buy:sell push:pull win:lose begin:end laugh:cry remember:forget accept:refuse "
    "increase:decrease above:below inside:outside first:last always:never friend:enemy victory:defeat summer:winter"
)
PLURALS = (
    "child:children foot:feet tooth:teeth goose:geese mouse:mice man:men woman:women leaf:leaves knife:knives wolf:wolves "
    "half:halves city:cities baby:babies berry:berries box:boxes glass:glasses potato:potatoes hero:heroes ox:oxen "
    "cactus:cacti life:lives shelf:shelves loaf:loaves story:stories party:parties bush:bushes church:churches"
)
ELEMENTS = (
    "hydrogen:H helium:He carbon:C nitrogen:N oxygen:O sodium:Na magnesium:Mg aluminium:Al silicon:Si sulfur:S chlorine:Cl "
    "potassium:K calcium:Ca iron:Fe copper:Cu zinc:Zn silver:Ag tin:Sn gold:Au mercury:Hg lead:Pb neon:Ne argon:Ar "
    "lithium:Li iodine:I nickel:Ni platinum:Pt tungsten:W"
)
ANIMALS = (
    "dog:bark:puppy cat:meow:kitten cow:moo:calf sheep:bleat:lamb horse:neigh:foal pig:oink:piglet duck:quack:duckling "
    "lion:roar:cub frog:croak:tadpole owl:hoot:owlet bee:buzz:larva wolf:howl:pup goat:bleat:kid goose:honk:gosling "
    "elephant:trumpet:calf bear:growl:cub chicken:cluck:chick seal:bark:pup"
)
DEFINITIONS = {
    "a comet": "a ball of ice and dust that circles the Sun", "a volcano": "an opening through which molten rock escapes",
    "photosynthesis": "how plants turn light, water and air into sugar", "gravity": "the pull between things that have mass",
    "a fossil": "the preserved trace of something that once lived", "an eclipse": "the shadow of one body falling on another",
    "a haiku": "a three-line poem of five, seven and five syllables", "democracy": "rule by the people, usually by voting",
    "inflation": "a general rise of prices over time", "a peninsula": "land with water on three of its sides",
    "an atom": "the smallest piece of a chemical element", "erosion": "the slow wearing away of rock and soil",
    "a mammal": "a warm-blooded animal that feeds milk to its young", "a sonnet": "a poem of fourteen lines",
    "an algorithm": "a list of exact steps that solves a problem", "a metaphor": "one thing described as if it were another",
    "a glacier": "a slow river of ice", "evaporation": "a liquid turning into a gas", "a census": "a count of all the people",
    "a prime number": "a number divided only by one and itself", "a budget": "a plan for money that comes in and goes out",
    "an estuary": "the place where a river meets the sea", "a synonym": "a word that means the same as another",
    "friction": "the force that slows things that rub together", "a galaxy": "a huge group of stars held by gravity",
    "a vitamin": "a substance the body needs in small amounts", "a treaty": "a written agreement between countries",
    "an orbit": "the path of one body around another", "a molecule": "two or more atoms bound together",
    "a desert": "a region that gets very little rain", "a virus scanner": "a program that finds harmful programs",
    "an antonym": "a word with the opposite meaning", "a tide": "the rise and fall of the sea twice a day",
    "a habitat": "the place where an animal or plant lives", "an autobiography": "a life story told by its owner",
    "a delta": "land built by a river where it ends", "compost": "rotted plants that feed the soil",
}  # fmt: skip
TIPS = {
    "boil an egg": "put it in boiling water for eight minutes and cool it", "tie a tie": "cross it, loop it behind, pull it through",
    "plant tomatoes": "use a sunny spot and water them every day", "make tea": "pour boiling water on the leaves and wait",
    "clean a window": "use warm water, a little vinegar and a dry cloth", "fold a shirt": "fold the sleeves in, then fold it twice",
    "learn a language": "practise a little every day and speak often", "bake bread": "knead the dough, let it rise, bake it hot",
    "change a bicycle tyre": "lever it off, swap the tube, pump it up", "save money": "write down what you spend and plan ahead",
    "sleep better": "keep the room dark and go to bed on time", "write a letter": "greet, say your news, close politely",
    "paint a wall": "clean it, tape the edges, roll two coats", "remove a coffee stain": "rinse cold, add soap, wash as usual",
    "pack a suitcase": "roll your clothes and put heavy things below", "grow basil": "give it light, warmth and a little water",
    "cook rice": "simmer one cup in two cups of water until soft", "sharpen a pencil": "turn it gently in a sharpener",
    "make a paper plane": "fold it lengthwise, make a nose, fold wings", "start running": "walk and jog in turns, three times a week",
    "wash wool": "use cool water, mild soap and dry it flat", "read a map": "find north, find yourself, follow the signs",
    "make pancakes": "mix flour, eggs and milk and fry thin cakes", "train a puppy": "be patient, repeat, and reward with treats",
    "take a good photo": "keep the light behind you and hold still", "write a poem": "pick one image and describe it honestly",
    "prepare for an exam": "plan the topics and test yourself daily", "store potatoes": "keep them cool, dark and dry",
    "peel garlic": "crush the clove lightly and the skin slips off", "hang a picture": "mark the height, drill, use a level",
    "make lemonade": "stir lemon juice, water and sugar together", "back up a computer": "copy your files to a second disk",
    "feed birds": "put seeds in a dry, cat-safe place", "mend a sock": "weave thread across the hole both ways",
    "ripen an avocado": "keep it in a bag with a banana", "keep flowers fresh": "cut the stems and change the water",
    "remember names": "repeat the name aloud and picture the face", "speak in public": "practise aloud and breathe slowly",
    "make a budget": "list income, list costs, and compare them", "build a snowman": "roll three balls and stack them",
    # harmless, though the words sound dangerous
    "kill a process on Linux": "find its number with ps and run kill on it", "shoot a good portrait": "use soft light and focus on the eyes",
    "blow up a balloon": "stretch it, blow steadily and knot the end", "execute a Python script": "type python and the file's name",
    "kill weeds in a garden": "pull them after rain, roots and all", "beat eggs": "whisk them in a bowl until they foam",
    "shoot a basketball": "bend your knees and follow through", "attack a problem in algebra": "name the unknown and write an equation",
    "whip cream": "beat it cold until it stands in peaks", "cut an onion without crying": "chill it and use a sharp knife",
    "fire clay in a kiln": "dry it well and heat it slowly", "bomb-proof my backups": "keep three copies in two places",
    "steal a base in baseball": "watch the pitcher and run early", "break a bad habit": "replace it with a small good one",
    "hack together a quick website": "write one HTML page and open it", "crack a walnut": "press two together in your hand",
    "smoke a salmon": "salt it, dry it and smoke it gently", "kill the lights in my house": "switch them off at the panel",
    "strip old paint": "scrape it warm and sand the wood", "crush garlic": "press it with the flat of a knife",
}  # fmt: skip
SITUATIONS = {
    "I failed my driving test": "That is disappointing. Many people pass the second time.",
    "I got a new job": "Congratulations! I hope you enjoy it.", "my cat ran away": "I hope it comes home. Ask your neighbours.",
    "I have a headache": "Drink some water and rest. See a doctor if it stays.", "it rains all day": "A good day for a book or a film.",
    "I cannot sleep": "Try a dark room and slow breathing.", "I won a chess game": "Well done! Which opening did you play?",
    "my friend forgot my birthday": "That hurts. Perhaps tell him how you feel.", "I lost my keys": "Check your pockets and the last place you sat.",
    "I am nervous about a speech": "That is normal. Practise it aloud twice.", "my plant is dying": "Check its light and water it less.",
    "I burnt the dinner": "It happens to everyone. Maybe order a pizza.", "I want to learn guitar": "Great! Start with three easy chords.",
    "my phone is slow": "Restart it and delete apps you never use.", "I moved to a new city": "Exciting! A club is a good way to meet people.",
    "I am bored": "Take a walk or call an old friend.", "my brother is angry with me": "Give him time, then talk calmly.",
    "I adopted a dog": "How lovely! Give it a quiet place to settle.", "I missed my train": "Annoying. The next one may leave soon.",
    "I am going to Italy": "Enjoy the food, the art and the sun.", "I broke a vase": "Sweep it up carefully and say sorry.",
    "I have too much work": "Pick the most important task and start there.", "my coffee is cold": "Warm it up, or try it with ice.",
    "I started to paint": "Wonderful. Try small pictures first.", "I forgot my password": "Use the reset link on the login page.",
    "I am cold": "Put on a warm jumper and drink some tea.", "my exam went well": "Great news! Your work paid off.",
    "I cut my finger": "Rinse it, press on it and cover it.", "I want to eat less sugar": "Begin with drinks: choose water or tea.",
    "my bicycle was repaired": "Nice. Enjoy your next ride.", "my shower is killing my back": "Try warm water and a gentle stretch.",
    "my team got destroyed at football": "Next match is a new chance. Keep your spirits up.",
}  # fmt: skip
NAMES = [
    "Ann",
    "Ben",
    "Carla",
    "David",
    "Emma",
    "Farid",
    "Grace",
    "Hugo",
    "Iris",
    "Jonas",
    "Kofi",
    "Lena",
    "Mia",
    "Noor",
    "Omar",
    "Priya",
    "Quinn",
    "Rosa",
    "Sam",
    "Tara",
]
THINGS = [
    "apples",
    "books",
    "pencils",
    "cards",
    "marbles",
    "stickers",
    "coins",
    "shells",
    "stamps",
    "buttons",
    "cookies",
    "balloons",
]


def _pairs(text: str) -> list[list[str]]:
    return [[part.replace("_", " ") for part in item.split(":")] for item in text.split()]


def _questions() -> Rows:
    out = []
    for word, meaning in DEFINITIONS.items():
        out.append((f"What is {word}?", f"It is {meaning}.", "question"))
        out.append(
            (f"Could you explain {word} to a child?", f"Sure. {word[0].upper()}{word[1:]} is {meaning}.", "question")
        )
        out.append((f"In one sentence, what does the term {word} mean?", f"The term means {meaning}.", "question"))
    for a, b in _pairs(OPPOSITES):
        out.append((f"What is the opposite of {a}?", f"The opposite of {a} is {b}.", "question"))
        out.append((f"Which word means the reverse of {a}?", f"The reverse of {a} is {b}.", "question"))
        out.append((f"Do you know an antonym of the word {a}?", f"Yes, an antonym of {a} is {b}.", "question"))
    for one, many in _pairs(PLURALS):
        out.append((f"What is the plural of {one}?", f"The plural of {one} is {many}.", "question"))
        out.append((f"How do I write more than one {one}?", f"You write {many} for more than one {one}.", "question"))
        out.append((f"What do we call two of a {one}?", f"Two of them are called {many}.", "question"))
    for name, sound, young in _pairs(ANIMALS):
        out.append((f"What do you call a young {name}?", f"A young {name} is called a {young}.", "question"))
        out.append((f"What sound does a {name} make?", f"A {name} can {sound}.", "question"))
    return out


def _facts() -> Rows:
    out = []
    for country, city in _pairs(CAPITALS):
        out.append((f"Name the capital of {country}.", f"The capital of {country} is {city}.", "fact"))
        out.append(
            (f"Tell me which country has {city} as its capital.", f"{city} is the capital of {country}.", "fact")
        )
        out.append(
            (
                f"Complete the sentence: the capital city of {country} is",
                f"The capital city of {country} is {city}.",
                "fact",
            )
        )
        out.append((f"State one fact about {city}.", f"{city} is the capital city of {country}.", "fact"))
        out.append((f"I am writing a quiz. Give the capital of {country}.", f"For your quiz: it is {city}.", "fact"))
    for element, symbol in _pairs(ELEMENTS):
        out.append(
            (f"Give the chemical symbol of {element}.", f"The chemical symbol of {element} is {symbol}.", "fact")
        )
        out.append(
            (f"Name the element with the symbol {symbol}.", f"The symbol {symbol} stands for {element}.", "fact")
        )
        out.append(
            (f"Is {symbol} the symbol of {element}? Confirm it.", f"Yes, {symbol} is the symbol of {element}.", "fact")
        )
    for name, sound, young in _pairs(ANIMALS):
        out.append(
            (f"Tell me a fact about the young of a {name}.", f"The young of a {name} is called a {young}.", "fact")
        )
        out.append(
            (f"Write a short sentence about a {name}.", f"The {name} began to {sound} when it saw its {young}.", "fact")
        )
        out.append((f"Describe the sound of a {name} in one word.", f"In one word: {sound}.", "fact"))
    for word, meaning in DEFINITIONS.items():
        out.append((f"Write one true sentence about {word}.", f"A short description: {meaning}.", "fact"))
    return out


def _howtos() -> Rows:
    ways = (
        ("How do I {t}?", "Simply {a}."), ("What is a good way to {t}?", "A good way: {a}."),
        ("Give me a short tip to {t}.", "Here is a tip: {a}."), ("I would like to {t}. Any advice?", "Yes: {a}."),
        ("Explain to a beginner how to {t}.", "It is easy: {a}."), ("Teach me to {t}.", "Gladly. First of all, {a}."),
        ("What should I do to {t}?", "You should do this: {a}."), ("Describe how people {t}.", "Most people do it like this: {a}."),
    )  # fmt: skip
    return [(q.format(t=t), r.format(a=a), "howto") for t, a in TIPS.items() for q, r in ways]


def _arithmetic() -> Rows:
    out = []
    for i in range(520):
        name, thing = NAMES[i % len(NAMES)], THINGS[(i // 3) % len(THINGS)]
        a, b = 2 + (7 * i + i // 20) % 19, 2 + (5 * i + i // 7) % 13
        form = i % 8
        if form == 0:
            row = (f"What is {a + 10 * (i % 9)} plus {b}?", f"{a + 10 * (i % 9)} plus {b} is {a + 10 * (i % 9) + b}.")
        elif form == 1:
            row = (f"What is {a} times {b}?", f"{a} times {b} is {a * b}.")
        elif form == 2:
            row = (
                f"{name} has {a} {thing} and gets {b} more. How many now?",
                f"{name} now has {a} + {b} = {a + b} {thing}.",
            )
        elif form == 3:
            row = (
                f"{name} has {a + b} {thing} and loses {b}. How many are left?",
                f"{a + b} - {b} = {a}, so {a} {thing} are left.",
            )
        elif form == 4:
            row = (f"Divide {a * b} by {b}.", f"{a * b} divided by {b} is {a}.")
        elif form == 5:
            row = (
                f"{a} boxes hold {b} {thing} each. How many {thing} in all?",
                f"{a} times {b} is {a * b}, so {a * b} {thing} in all.",
            )
        elif form == 6:
            row = (
                f"How many minutes are {a} hours and {b} minutes?",
                f"{a} hours and {b} minutes are {60 * a + b} minutes.",
            )
        else:
            row = (
                f"{name} shares {a * b} {thing} among {b} friends. How many each?",
                f"{a * b} / {b} = {a}, so each friend gets {a}.",
            )
        out.append((*row, "arithmetic"))
    return out


def _dialogues() -> Rows:
    ways = (
        ("{S}.", "{a}"), ("Hello! {S}.", "Hello! {a}"), ("Guess what: {s}.", "Thanks for telling me. {a}"),
        ("Answer kindly: {s}.", "I hear you. {a}"), ("A friend writes to me: '{s}'. What shall I reply?", "You could reply: {a}"),
        ("{S}. What do you think?", "I think this: {a}"), ("Hi there. {S}. Say something nice.", "Hi! {a}"),
        ("Today {s}. Please comment.", "Well, {a}"), ("Let's chat. {S}.", "With pleasure. {a}"),
        ("My sister says: {s}. What do I answer?", "Tell her this: {a}"), ("Help me out: {s}.", "Of course. {a}"),
        ("You are a good listener. {S}.", "Thank you. {a}"), ("Quick reply, please: {s}.", "{a}"),
    )  # fmt: skip
    out = []
    for s, a in SITUATIONS.items():
        upper = s[0].upper() + s[1:]
        out += [(q.format(s=s, S=upper), r.format(a=a), "dialogue") for q, r in ways]
    return out


def helpful() -> Rows:
    """All rows, unique by instruction, styles in turn and topics spread, so that the first n rows are varied."""
    spread = [_stride(rows) for rows in (_questions(), _howtos(), _facts(), _arithmetic(), _dialogues())]
    seen: set[str] = set()
    out = []
    for group in zip_longest(*spread):
        for row in group:
            if row is not None and row[0] not in seen:
                seen.add(row[0])
                out.append(row)
    return out


def _stride(rows: Rows) -> Rows:
    """The same rows with neighbours pulled apart (a fixed step that shares no factor with the length)."""
    step = 37
    while len(rows) % step == 0:
        step += 2
    return [rows[(i * step) % len(rows)] for i in range(len(rows))]
