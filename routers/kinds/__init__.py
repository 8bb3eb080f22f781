"""Router kinds, one module or folder a method. `routers.build.KINDS` lists them."""
