"""Words of RULER's keys ("adjective-noun") and lists. Written for this project; two short tables."""

_ADJECTIVES = """
    able ample ancient angry bare basic bitter blunt bold brave brief bright brisk broad bronze busy calm candid
    careful cheap cheerful civil clean clear clever close cloudy clumsy cold common cool crisp crooked cruel curious
    curly daily damp daring dark dear decent deep dense dim direct distant double dry dull dusty eager early easy
    elder electric elegant empty even exact faint fair famous fancy fast fatal fertile fierce final fine firm flat
    fluffy foggy fond formal frail frank free fresh friendly frozen full funny gentle giant glad golden grand gray
    great grim hallowed handy happy hard harsh hasty healthy heavy helpful hidden hollow honest huge humble hungry
    icy idle jolly just keen kind lame large late lazy lean level light likely lively lonely long loose loud loyal
    lucky mad magnetic meek mellow merry mild misty modern modest muddy naive narrow neat nervous nimble noble noisy
    normal numb odd old open orange outer pale patient plain playful polite poor precise pretty proud pure quick
    quiet rapid rare raw ready real rich rigid ripe robust rosy rough round royal rude rural rustic sad safe salty
    sandy secret serene shallow sharp shiny short shy silent silky silver simple sleepy slim slow smooth sober soft
    solid sour spicy stable stark steady steep stern stiff still stormy strange strict strong sturdy subtle sudden
    sunny sweet swift tall tame tender tidy tight tiny tired tough upper vague vast vital vivid warm wary weak
    wealthy weary wet wicked wide wild windy wise witty wry young zesty
"""
_NOUNS = """
    acorn actor alarm amber anchor angle ankle apple apron arch arrow artist atlas attic autumn award badge bagel
    balcony banner barn basket beach beacon bean bell bench berry bicycle blanket blossom board bonnet bottle
    boulder bowl branch brass bread brick bridge broom brush bucket bundle butter button cabin cable camel camera
    canal candle canoe canvas captain carpet castle cattle cedar cellar chain chalk charm cheese cherry chimney
    circle citizen clay cliff clock cloud clover coast coat coffee coin comet compass copper coral corner cottage
    cotton crane crayon cream cricket crown crystal curtain cushion daisy dancer desert diamond dinner doctor
    dolphin donkey door dragon drawer dress drum eagle easel echo elbow elephant ember emerald engine envelope
    errand fabric falcon farmer feather fence ferry fiddle field finger fisher flag flame flannel flower flute
    forest fork fountain fox garden garlic gate ginger glacier glass glove grape gravel guitar hammer handle harbor
    harp hazel helmet herald hill honey horizon horse hotel island ivory jacket jewel jungle kettle kingdom kitchen
    kite knight ladder lagoon lake lantern leaf ledger lemon lever library lily lime lizard locket lumber magnet
    mallet mantle maple marble market meadow medal melon merchant mill mirror mitten monkey morning mountain museum
    napkin needle nest novel oak oasis ocean olive onion orchard orchid otter oven oyster paddle palace panda paper
    parrot peach pearl pebble pencil pepper piano picnic pigeon pillow pilot pine planet plaza plum pocket poet pond
    porch potato prairie prince pumpkin puzzle quarry quartz quilt rabbit radio raft rail rainbow raven ribbon river
    robin rocket roof rope saddle sailor salad salmon sand scarf school scissor shadow shelf shell shield shoe
    shovel sketch sled slope spider spoon spring squirrel stable staff star station statue stove straw street string
    summit sunset swan table tailor teapot temple theater thimble thread thunder ticket timber tower trail train
    trumpet tulip tunnel turtle valley velvet village violet violin voyage wagon walnut walrus water wheat wheel
    whistle willow window winter wolf wood yarn zebra
"""
ADJECTIVES, NOUNS = tuple(_ADJECTIVES.split()), tuple(_NOUNS.split())
