"""Router kinds, one module or folder a method. `routers.kind_list.KINDS` lists them."""
