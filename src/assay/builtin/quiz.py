"""General knowledge as multiple choice, written for Assay: none of it is asked in `helpful`."""

from __future__ import annotations

import random

# question | right | wrong | wrong | wrong
QUESTIONS = """
What do bees make? | Honey | Milk | Silk | Bread
Which of these is a fruit? | A banana | A carrot | A chair | A stone
Where do fish live? | In water | In trees | In clouds | In books
What do you use to cut paper? | Scissors | A spoon | A pillow | A cup
What falls from the sky when it rains? | Water | Sand | Paper | Glass
Which of these can fly? | A sparrow | A snail | A cow | A whale
What do you wear on your feet? | Shoes | Gloves | A hat | Glasses
Which season is the coldest? | Winter | Summer | Spring | Autumn
What does a clock show? | The time | The weather | The price | The distance
Who treats people who are ill? | A doctor | A baker | A pilot | A painter
What is ice made of? | Frozen water | Hot air | Dry wood | Soft wool
Which of these is used to write? | A pencil | A fork | A ladder | A blanket
What do plants need to grow? | Light and water | Shoes and hats | Music and noise | Salt and smoke
What shines in the sky by day? | The sun | The moon | A lamp | A candle
How many legs does a spider have? | Eight | Two | Four | Three
How many days are in a week? | Seven | Five | Ten | Twelve
How many wheels does a bicycle have? | Two | Six | Five | Eight
How many months are in a year? | Twelve | Seven | Nine | Twenty
What colour is grass? | Green | Purple | Red | Blue
What colour is snow? | White | Black | Orange | Brown
What do you use to open a locked door? | A key | A plate | A sock | A leaf
Where are books borrowed? | In a library | In a bakery | In a garage | In a stable
What do you call frozen rain that falls in flakes? | Snow | Steam | Dust | Smoke
Which of these is a musical instrument? | A violin | A hammer | A bottle | A shovel
Which of these is the heaviest? | An elephant | A mouse | A cat | A rabbit
Which of these is the fastest? | An aeroplane | A bicycle | A snail | A person on foot
What do caterpillars become? | Butterflies | Birds | Frogs | Spiders
Which organ pumps blood? | The heart | The lung | The skin | The stomach
With what do people hear? | With their ears | With their eyes | With their hands | With their feet
Which gas do people need to breathe? | Oxygen | Neon | Helium | Chlorine
What is the planet on which we live called? | Earth | Mars | Venus | Saturn
Around what does the Earth travel? | The Sun | The Moon | Mars | Venus
What makes bread rise? | Yeast | Sugar | Pepper | Vinegar
From which animal does wool come? | From sheep | From fish | From bees | From snakes
What is paper mostly made from? | Wood | Iron | Milk | Sand
What is glass made from? | Sand | Wood | Leather | Wool
What does a thermometer measure? | Temperature | Weight | Speed | Sound
What does a scale measure? | Weight | Time | Colour | Temperature
In which direction does the sun rise? | In the east | In the west | In the north | In the south
What do you call a shape with three sides? | A triangle | A square | A circle | A cube
What is the largest ocean? | The Pacific | The Atlantic | The Indian Ocean | The Arctic Ocean
Which of these is a continent? | Africa | Paris | The Nile | The Alps
Which of these is a river? | The Nile | The Alps | The Sahara | Iceland
Which of these is a desert? | The Sahara | The Nile | The Amazon | The Thames
Where do penguins live in the wild? | In the Antarctic | In the Sahara | In the Alps | In the rainforest
What do pandas mostly eat? | Bamboo | Fish | Nuts | Honey
Which animal carries its young in a pouch? | A kangaroo | A horse | A lion | A duck
What do you call someone who flies an aeroplane? | A pilot | A sailor | A farmer | A tailor
What do you call someone who bakes bread? | A baker | A butcher | A plumber | A lawyer
What do you put on a letter before you post it? | A stamp | A button | A coin | A spoon
Why do people carry umbrellas? | To stay dry | To see better | To run faster | To sleep well
Why do people eat? | To get energy | To get smaller | To become invisible | To make noise
What happens to water when it boils? | It becomes steam | It becomes ice | It becomes sand | It becomes oil
What happens to ice in the sun? | It melts | It grows | It burns | It sings
What should you do at a red traffic light? | Stop | Go faster | Turn around | Sleep
What do you do when you are thirsty? | You drink | You run | You cook | You read
Which of these burns? | Wood | Water | Stone | Glass
Which of these floats on water? | Wood | Iron | Gold | Stone
What attracts iron? | A magnet | A mirror | A candle | A sponge
What stores electricity? | A battery | A bucket | A basket | A pillow
""".strip()


def rows() -> list[tuple[str, tuple[str, ...], int]]:
    """Question, options in a fixed shuffled order, index of the right one."""
    out = []
    for line in QUESTIONS.splitlines():
        question, right, *wrong = (part.strip() for part in line.split("|"))
        options = [right, *wrong]
        random.Random(question).shuffle(options)
        out.append((question, tuple(options), options.index(right)))
    return out
