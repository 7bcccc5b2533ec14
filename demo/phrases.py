"""Other words for the demo world's things: those that captions of the training mix use, and those held out of it.

Every word of a held-out phrasing is in some training caption, so that a model can understand it and has never seen it.
"""

from __future__ import annotations

# Name -> what else a caption may call it.
SAYINGS: dict[str, tuple[str, ...]] = {
    "kitchen knife": ("a carving knife", "a knife from the kitchen"),
    "bomb": ("a bomb with a fuse", "an old round bomb"),
    "crossed swords": ("two crossed swords", "a pair of swords"),
    "dagger": ("a pointed dagger", "a short blade"),
    "syringe": ("a medical syringe", "a needle for an injection"),
    "cigarette": ("a lit cigarette", "a cigarette with smoke"),
    "wine glass": ("a glass of wine", "a glass of red wine"),
    "beer mug": ("a mug of beer", "a pint of beer"),
    "skull": ("a human skull", "a bony head"),
    "scissors": ("a pair of scissors", "open scissors"),
    "hammer": ("a hammer for nails", "a heavy hammer"),
    "spoon": ("a metal spoon", "a spoon for soup"),
    "ghost": ("a white ghost with its tongue out", "a friendly ghost"),
    "coffee cup": ("a cup of coffee", "a hot drink in a cup"),
    "cat": ("a kitten", "the head of a cat"),
    "dog": ("a puppy", "the head of a dog"),
    "rabbit": ("a bunny", "the head of a rabbit"),
    "fox": ("a red fox", "the head of a fox"),
    "panda": ("a panda bear", "the head of a panda"),
    "pig": ("a piglet", "the head of a pig"),
    "frog": ("a green frog", "the head of a frog"),
    "lion": ("a lion with a mane", "the king of the animals"),
    "penguin": ("a bird of the south pole", "a little penguin"),
    "owl": ("a bird of the night", "a wise owl"),
    "octopus": ("an animal with eight arms", "a little octopus"),
    "fish": ("a swimming fish", "an animal with fins"),
    "whale": ("a big whale", "a whale in the sea"),
    "turtle": ("a green turtle", "an animal with a shell on its back"),
    "butterfly": ("an insect with large wings", "a pretty butterfly"),
    "snail": ("a slow snail", "a snail with its house"),
    "bee": ("a honey bee", "an insect with stripes"),
    "apple": ("a red apple", "a ripe apple"),
    "banana": ("a yellow banana", "a peeled banana"),
    "strawberry": ("a red strawberry", "a ripe strawberry"),
    "grapes": ("a bunch of grapes", "purple grapes"),
    "watermelon": ("a slice of watermelon", "a piece of watermelon"),
    "pineapple": ("a whole pineapple", "a ripe pineapple"),
    "carrot": ("an orange carrot", "a root with green leaves"),
    "pizza": ("a slice of pizza", "a piece of pizza"),
    "hamburger": ("a burger", "a bun with meat"),
    "donut": ("a doughnut", "a ring of sweet dough"),
    "cheese": ("a piece of cheese", "a wedge of cheese"),
    "mushroom": ("a red mushroom", "a toadstool"),
    "car": ("an automobile", "a red car"),
    "bus": ("a big bus", "a city bus"),
    "bicycle": ("a bike", "a bike with two wheels"),
    "rocket": ("a space rocket", "a flying rocket"),
    "sailboat": ("a boat with a sail", "a sailing boat"),
    "umbrella": ("an open umbrella", "an umbrella for the rain"),
    "key": ("a metal key", "a key for a door"),
    "book": ("a closed book", "a red book"),
    "guitar": ("a wooden guitar", "a guitar with strings"),
    "trumpet": ("a golden trumpet", "a brass horn"),
    "camera": ("a photo camera", "a camera with a lens"),
    "alarm clock": ("a ringing clock", "a clock with an alarm"),
    "light bulb": ("an electric light", "a glowing bulb"),
    "crown": ("a golden crown", "the crown of a king"),
    "shoe": ("a leather shoe", "a brown shoe"),
    "gift": ("a present", "a box with a ribbon on it"),
    "balloon": ("a red balloon", "a flying balloon"),
    "soccer ball": ("a football", "a ball for soccer"),
    "candle": ("a burning candle", "a candle with a flame on it"),
    "cactus": ("a green cactus", "a plant of the desert"),
    "sunflower": ("a yellow flower", "a flower like the sun"),
}
# Name -> phrasings that no training caption holds.
HELD_OUT: dict[str, tuple[str, ...]] = {
    "kitchen knife": ("a knife for the kitchen", "a knife for carving"),
    "bomb": ("a round bomb", "an old bomb with a fuse"),
    "crossed swords": ("two swords", "a pair of crossed swords"),
    "dagger": ("a short dagger", "a short pointed blade"),
    "syringe": ("a medical needle", "a syringe for an injection"),
    "cigarette": ("a lit cigarette with smoke", "a burning cigarette"),
    "wine glass": ("a glass with wine in it", "red wine in a glass"),
    "beer mug": ("a mug with beer in it", "a pint mug of beer"),
    "skull": ("a bony human skull", "the skull of a human"),
    "scissors": ("a pair of open scissors", "metal scissors"),
    "hammer": ("a heavy metal hammer",),
    "spoon": ("a spoon of metal",),
    "ghost": ("a friendly white ghost",),
    "coffee cup": ("hot coffee in a cup", "a cup with coffee in it"),
    "cat": ("a little kitten", "a little cat"),
    "dog": ("a little puppy", "a little dog"),
    "rabbit": ("a little bunny", "a little rabbit"),
    "fox": ("a little red fox",),
    "panda": ("a big panda bear",),
    "pig": ("a little piglet",),
    "frog": ("a little green frog",),
    "lion": ("the head of a lion",),
    "penguin": ("a penguin of the south pole",),
    "owl": ("an owl of the night",),
    "octopus": ("an octopus with eight arms",),
    "fish": ("a fish with fins", "a fish in the sea"),
    "whale": ("a big swimming whale",),
    "turtle": ("a turtle with a shell on its back",),
    "butterfly": ("a butterfly with large wings",),
    "snail": ("a slow snail with its house",),
    "bee": ("a bee with stripes",),
    "apple": ("a ripe red apple",),
    "banana": ("a ripe banana",),
    "strawberry": ("a ripe red strawberry",),
    "grapes": ("a bunch of purple grapes", "ripe grapes"),
    "watermelon": ("a ripe watermelon",),
    "pineapple": ("a whole ripe pineapple",),
    "carrot": ("a carrot with green leaves",),
    "pizza": ("a whole slice of pizza",),
    "hamburger": ("a hamburger with meat",),
    "donut": ("a sweet donut",),
    "cheese": ("a slice of cheese",),
    "mushroom": ("a little red mushroom",),
    "car": ("a red automobile",),
    "bus": ("a big city bus",),
    "bicycle": ("a bicycle with two wheels",),
    "rocket": ("a flying space rocket",),
    "sailboat": ("a sailboat in the sea",),
    "umbrella": ("an open umbrella for the rain",),
    "key": ("a metal key for a door",),
    "book": ("a closed red book",),
    "guitar": ("a wooden guitar with strings",),
    "trumpet": ("a golden horn",),
    "camera": ("a photo camera with a lens",),
    "alarm clock": ("a ringing alarm clock",),
    "light bulb": ("a glowing electric light", "an electric bulb"),
    "crown": ("the golden crown of a king",),
    "shoe": ("a brown leather shoe",),
    "gift": ("a gift with a ribbon on it", "a present with a ribbon"),
    "balloon": ("a flying red balloon",),
    "soccer ball": ("a ball like a football",),
    "candle": ("a flame on a candle",),
    "cactus": ("a cactus of the desert",),
    "sunflower": ("a yellow sunflower",),
}

# Two of a thing; what has no plural here is drawn as several or as a mass already.
WITHOUT_PLURAL = ("crossed swords", "scissors", "grapes", "cheese")
IRREGULAR = {"kitchen knife": "kitchen knives", "butterfly": "butterflies", "strawberry": "strawberries"}
IRREGULAR |= {"fish": "fish", "octopus": "octopuses", "cactus": "cacti", "bus": "buses", "wine glass": "wine glasses"}
IRREGULAR |= {"fox": "foxes"}
TWO, TWO_HELD_OUT = ("two", "a pair of"), ("two little", "the two")

LEADS = ("", "", "a picture of ", "a drawing of ", "an image of ")
LEADS_HELD_OUT = ("the drawing of ", "a picture with ")
STYLED = (" in the style of {}", " in the style of {}", " in {} style")
STYLED_HELD_OUT = (" drawing in the {} style",)
ON = (" on a {} background", " on a {} background", " with a {} background")
ON_HELD_OUT = (" on {}", " with a background in {}")
# What stands where a caption leaves its thing out: nothing at all, too, as when the words are struck out.
ANYTHING = ("something", "something", "a picture", "a drawing", "")


def plural(name: str) -> str:
    return IRREGULAR.get(name, f"{name}s")
