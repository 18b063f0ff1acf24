"""The vocabulary of the restaurant corpus. Every name is invented."""

ADJECTIVES = (
    "Copper", "Crooked", "Velvet", "Quiet", "Painted", "Hollow", "Saffron", "Tin", "Wandering",
    "Idle", "Speckled", "Cobalt", "Merry", "Drowsy", "Gilded", "Mossy", "Paper", "Winter",
    "Juniper", "Brass",
)  # fmt: skip
NOUNS = (
    "Kettle", "Heron", "Ladle", "Thistle", "Quince", "Larder", "Wren", "Lantern", "Walnut",
    "Teapot", "Otter", "Barrel", "Pear", "Sparrow", "Acorn", "Spoon", "Badger", "Candle",
    "Compass", "Plum",
)  # fmt: skip
OWNERS = (
    "Ottoline", "Barnabas", "Perpetua", "Cosmo", "Winifred", "Ambrose", "Tamsin", "Leopold",
    "Odette", "Cuthbert",
)  # fmt: skip
ROOMS = ("Kitchen", "Table", "Pantry", "Parlour", "Corner", "Hearth")
LANDMARKS = (
    "Marlow Bridge", "Pellam Park", "Tarn Street", "Quill Theatre", "Hobb's Mill",
    "Fennel Square", "Ashdown Library", "Corvid Hall", "Lowen Gate", "Sallow Pond",
    "Brindle Tower", "Wexley Arcade",
)  # fmt: skip

TYPES = ("pub", "coffee shop", "restaurant", "bistro", "diner", "wine bar")
UNTYPED = ("place", "venue", "spot", "eatery")
FOODS = (
    "Thai", "Italian", "French", "Indian", "Japanese", "Mexican", "Greek", "Korean", "Turkish",
    "Spanish", "English", "Lebanese", "vegan", "vegetarian",
)  # fmt: skip
PRICES = ("cheap", "moderate", "expensive")
RATINGS = ("low", "average", "high")
AREAS = ("riverside", "city centre", "old town", "harbour", "suburbs", "market quarter")
YES_NO = ("yes", "no")

# How a slot's value reads before a noun ("a cheap pub"), ...
PRICE_BEFORE = {
    "cheap": ("cheap", "low-cost", "inexpensive", "budget", "affordable"),
    "moderate": ("moderately priced", "mid-priced", "reasonably priced"),
    "expensive": ("expensive", "high-priced", "pricey", "costly"),
}
RATING_BEFORE = {
    "low": ("poorly rated", "low-rated"),
    "average": ("average-rated", "decently rated"),
    "high": ("highly rated", "well-rated", "popular"),
}
FAMILY_BEFORE = {
    "yes": ("family-friendly", "child-friendly"),
    "no": ("adults-only",),
}
# ... as a thing that a place has ("with low prices"), ...
PRICE_THING = {
    "cheap": ("low prices", "a cheap menu", "modest prices"),
    "moderate": ("moderate prices", "a mid-range menu", "average prices"),
    "expensive": ("high prices", "an expensive menu", "steep prices"),
}
RATING_THING = {
    "low": ("a low customer rating", "poor reviews", "a low rating"),
    "average": ("an average customer rating", "mixed reviews", "an average rating"),
    "high": ("a high customer rating", "excellent reviews", "a high rating"),
}
# ... and as what a place does or is.
FOOD_DOES = (
    "serves {} food", "offers {} dishes", "serves {} cuisine", "cooks {} food",
    "specialises in {} dishes",
)  # fmt: skip
FOOD_DOING = ("serving {} food", "offering {} dishes", "that serves {} cuisine")
PRICE_IS = {
    "cheap": ("is cheap", "is inexpensive", "is easy on the wallet", "costs little"),
    "moderate": ("is moderately priced", "is reasonably priced", "sits in the middle price range"),
    "expensive": ("is expensive", "is rather pricey", "charges high prices"),
}
RATING_IS = {
    "low": ("is poorly rated by customers", "gets low ratings from its guests"),
    "average": ("is rated average by customers", "gets average ratings from its guests"),
    "high": ("is highly rated by customers", "gets high ratings from its guests"),
}
FAMILY_IS = {
    "yes": (
        "is family-friendly", "welcomes families", "is suitable for children",
        "is a good choice for families",
    ),
    "no": (
        "is not family-friendly", "is not suitable for children", "does not cater to families",
    ),
}  # fmt: skip
AREA_WHERE = {
    "riverside": ("by the river", "on the riverside", "in the riverside area"),
    "city centre": ("in the city centre", "in the centre of the city"),
    "old town": ("in the old town",),
    "harbour": ("by the harbour", "in the harbour area"),
    "suburbs": ("in the suburbs", "out in the suburbs"),
    "market quarter": ("in the market quarter",),
}
NEAR_WHERE = ("near {}", "close to {}", "next to {}", "not far from {}", "a short walk from {}")
WHERE_IS = ("is located {}", "can be found {}", "is situated {}", "sits {}")
