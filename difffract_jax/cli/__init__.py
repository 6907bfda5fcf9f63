"""The `difffract` command, one module a family of commands.

main            the command, and convert, generate, trace
requests        what the options of a trace ask for; settings: of the commands on circuits; options: of all
output          what is printed
"""
