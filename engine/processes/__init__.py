"""A run in several processes of this machine: shares.py says what each of them has, driver.py takes captions in from
them, handout.py decides who gets which image, child.py starts one, worker.py is what runs in it.
"""
