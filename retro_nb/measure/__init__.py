"""Does the model read what it retrieves?"""
