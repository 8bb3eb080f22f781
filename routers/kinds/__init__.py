"""Router kinds, one module or folder a method. `routers.factory.KINDS` lists them."""
