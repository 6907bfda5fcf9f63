"""What sources do beyond single edges: by head, along all paths, in the frozen and in the real model.

attention       edges by head, attention scores by pairs of sources; heads: the same, boiled down
readings        features scaled, from the exact frozen map to the real model; effects along a graph's paths
total_effects   what every source of all steps adds to an output along all paths; effect_tables: summed
"""
