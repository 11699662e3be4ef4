"""The names that problems are told with: three worlds, each with four categories from top to bottom.

An item of a category owns items of the next one: each Frost Harbor has Sloops, each Sloop has Oak Crates,
each Oak Crate has Apples. A problem takes a run of 2 to 4 neighbouring categories of one world, and from each
the names of one group only (all its ships are sailing ships), so that which items belong to a category must
be learned rather than read off the text.

All names are distinct over all worlds, a group has at least four of them, and none holds "'s ", ".", "," or
" and ": with such a name the sentences could not be taken apart again. One in a hundred problems of the
original has no answer because of its "Kid's Animal Farm".
"""

WORLDS = {
    "harbors": {
        "Harbor": {
            "northern": ["Frost Harbor", "Seal Bay", "Aurora Quay", "Birch Landing", "Tundra Dock"],
            "southern": ["Palm Harbor", "Coral Bay", "Lagoon Quay", "Mango Landing", "Monsoon Dock"],
            "river": ["Willow Wharf", "Heron Wharf", "Otter Pier", "Reed Pier", "Delta Wharf"],
            "island": ["Gull Pier", "Pearl Wharf", "Lantern Bay", "Anchor Quay", "Turtle Landing"],
        },
        "Ship": {
            "sailing": ["Sloop", "Schooner", "Clipper", "Brigantine", "Ketch"],
            "fishing": ["Trawler", "Dory", "Longliner", "Seiner", "Drifter"],
            "cargo": ["Freighter", "Tanker", "Barge", "Coaster", "Collier"],
            "passenger": ["Ferry", "Steamer", "Liner", "Catamaran", "Gondola"],
        },
        "Crate": {
            "wooden": ["Oak Crate", "Pine Crate", "Cedar Crate", "Maple Crate", "Walnut Crate"],
            "metal": ["Iron Crate", "Copper Crate", "Zinc Crate", "Brass Crate", "Steel Crate"],
            "woven": ["Wicker Hamper", "Reed Hamper", "Straw Hamper", "Hemp Sack", "Linen Sack"],
            "painted": ["Red Barrel", "Blue Barrel", "Green Barrel", "White Barrel", "Yellow Barrel"],
        },
        "Fruit": {
            "orchard": ["Apple", "Pear", "Plum", "Cherry", "Quince"],
            "citrus": ["Orange", "Lemon", "Lime", "Grapefruit", "Tangerine"],
            "tropical": ["Mango", "Papaya", "Banana", "Guava", "Lychee"],
            "berries": ["Raspberry", "Blueberry", "Gooseberry", "Cranberry", "Mulberry"],
        },
    },
    "museums": {
        "Museum": {
            "city": ["Capitol Museum", "Station Museum", "Bridge Museum", "Market Museum", "Tower Museum"],
            "castle": ["Raven Castle", "Lion Castle", "Rose Castle", "Falcon Castle", "Dragon Castle"],
            "house": ["Potter House", "Weaver House", "Miller House", "Mason House", "Fisher House"],
            "school": ["Newton School", "Curie School", "Darwin School", "Kepler School", "Euler School"],
        },
        "Gallery": {
            "floors": ["Cellar Gallery", "Attic Gallery", "Ground Gallery", "Terrace Gallery", "Balcony Gallery"],
            "wings": ["North Wing", "South Wing", "East Wing", "West Wing", "Central Wing"],
            "halls": ["Marble Hall", "Mirror Hall", "Velvet Hall", "Crystal Hall", "Ivory Hall"],
            "rooms": ["Map Room", "Clock Room", "Music Room", "Garden Room", "Archive Room"],
        },
        "Cabinet": {
            "cabinets": ["Glass Cabinet", "Corner Cabinet", "Wall Cabinet", "Tall Cabinet", "Round Cabinet"],
            "drawers": ["Ebony Drawer", "Teak Drawer", "Ash Drawer", "Elm Drawer", "Beech Drawer"],
            "shelves": ["Upper Shelf", "Middle Shelf", "Lower Shelf", "Hidden Shelf", "Narrow Shelf"],
            "chests": ["Pirate Chest", "Sailor Chest", "Royal Chest", "Bridal Chest", "Captain Chest"],
        },
        "Exhibit": {
            "fossils": ["Ammonite", "Trilobite", "Mammoth Tusk", "Shark Tooth", "Amber Fly"],
            "minerals": ["Quartz", "Garnet", "Topaz", "Opal", "Jasper"],
            "coins": ["Ducat", "Florin", "Guilder", "Shilling", "Denarius"],
            "instruments": ["Violin", "Flute", "Lute", "Oboe", "Harp"],
        },
    },
    "valleys": {
        "Valley": {
            "waters": ["Brook Valley", "Cascade Valley", "Mist Valley", "Spring Valley", "Rapids Valley"],
            "stones": ["Granite Valley", "Slate Valley", "Chalk Valley", "Flint Valley", "Basalt Valley"],
            "beasts": ["Wolf Valley", "Bear Valley", "Eagle Valley", "Fox Valley", "Lynx Valley"],
            "weathers": ["Thunder Valley", "Sunny Valley", "Windy Valley", "Snow Valley", "Rainbow Valley"],
        },
        "Forest": {
            "old": ["Elder Forest", "Ancient Forest", "Silent Forest", "Hollow Forest", "Whispering Forest"],
            "royal": ["Crown Forest", "King Forest", "Queen Forest", "Prince Forest", "Bishop Forest"],
            "groves": ["Moss Grove", "Fern Grove", "Ivy Grove", "Clover Grove", "Thistle Grove"],
            "woods": ["Hunter Wood", "Shepherd Wood", "Hermit Wood", "Pilgrim Wood", "Tinker Wood"],
        },
        "Tree": {
            "broadleaf": ["Oak", "Beech", "Maple", "Birch", "Elm"],
            "conifers": ["Pine", "Spruce", "Fir", "Larch", "Cypress"],
            "blossoming": ["Magnolia", "Hawthorn", "Rowan", "Dogwood", "Lilac"],
            "riverside": ["Willow", "Alder", "Poplar", "Aspen", "Hornbeam"],
        },
        "Bird": {
            "songbirds": ["Robin", "Wren", "Finch", "Thrush", "Nightingale"],
            "raptors": ["Falcon", "Hawk", "Buzzard", "Kestrel", "Osprey"],
            "waders": ["Heron", "Stork", "Crane", "Ibis", "Egret"],
            "crows": ["Raven", "Magpie", "Jackdaw", "Rook", "Jay"],
        },
    },
}

# {category: [item, ...]} over all worlds: what `solve` and `check_solution` know when told nothing else
CATEGORIES = {
    category: [name for names in groups.values() for name in names]
    for world in WORLDS.values()
    for category, groups in world.items()
}
